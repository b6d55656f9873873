"""scipy, torchvision and matplotlib are not imported only because Lightning imports torchmetrics.

torchmetrics imports whatever is installed of what some of its metrics want.  Without these three,
`import torch, lightning.pytorch` takes 0.7 of the processor's time and 103 of 914 MB less (three
turns each).  Whoever else wants them imports them as ever; torchmetrics itself holds them to be not
installed, so its plots and the metrics that need them are refused, unless it was imported first.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SPARED = ("scipy", "torchvision", "matplotlib")


def spare() -> None:
    """Let torchmetrics, once it is imported, do without; changes nothing where it is already."""
    if "torchmetrics" not in sys.modules and not any(
        isinstance(finder, _Finder) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchmetrics, once, and has it executed without what is spared."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_without(module: ModuleType) -> None:
            try:
                with _not_installed(SPARED):
                    execute(module)
            except ImportError:  # another version, which cannot do without
                for part in [key for key in sys.modules if key.startswith("torchmetrics.")]:
                    del sys.modules[part]
                execute(module)

        spec.loader.exec_module = execute_without  # type: ignore[method-assign]
        return spec


@contextmanager
def _not_installed(packages: Sequence[str]) -> Iterator[None]:
    """Let these packages seem not to be installed, for `import` and for Lightning's own question.

    Those that are imported already stay.
    """
    from lightning_utilities.core import imports

    hidden = [package for package in packages if package not in sys.modules]
    version_of = getattr(imports, "_version", None)  # private: may have moved

    def version(distribution_name: str) -> str:
        if distribution_name in hidden:
            raise imports.PackageNotFoundError(distribution_name)
        assert version_of is not None
        return version_of(distribution_name)

    if version_of is not None:
        imports._version = version
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        if version_of is not None:
            imports._version = version_of
        for package in hidden:
            sys.modules.pop(package, None)
