"""What differs from the recorded commit, as a patch: `git apply` on that commit gives it back.

The user's index, objects and files are only read: git works on a copy of the index, and writes what
it must write into a temporary folder.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from research.tracking.provenance import git

MAX_BYTES = 1_000_000
SECONDS = 10.0
NAMED = 20  # of the files that are left out


def uncommitted_patch(folder: Path, commit: str) -> bytes | None:
    """The patch from `commit`, which is checked out in `folder`, to the work tree around it.

    It holds changed, deleted and new files, but for those that git ignores. Of files that would
    make it larger than `MAX_BYTES` the smallest are taken; the first lines name the others. None
    if nothing differs.
    """
    until = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        try:
            patch, left_out = _patch(folder, commit, Path(scratch), until)
        except _GitFailed:
            patch, left_out = b"", [f"everything: git failed, or took more than {SECONDS:g} s"]
    if not patch and not left_out:
        return None
    words = [f"What differs from commit {commit}; `git apply` there gives it back."]
    if left_out:
        words += ["NOT WHOLE. Left out:", *(f"  {name}" for name in left_out[:NAMED])]
    if len(left_out) > NAMED:
        words.append(f"  and {len(left_out) - NAMED} more")
    return "".join(f"# {line}\n" for line in words).encode(errors="replace") + patch


class _GitFailed(Exception):
    pass


def _patch(folder: Path, commit: str, scratch: Path, until: float) -> tuple[bytes, list[str]]:
    def run(*arguments: str, lines: bytes = b"", place: Path = folder) -> bytes:
        seconds = until - time.monotonic()
        answer = git(place, *arguments, seconds=seconds, environment=environment, lines=lines)
        if answer is None:
            raise _GitFailed
        return answer

    environment: dict[str, str] = {}
    where = run("rev-parse", "--show-toplevel", "--git-path", "index", "--git-path", "objects")
    top, index, objects = (folder / os.fsdecode(line) for line in where.splitlines())
    if index.exists():
        shutil.copy2(index, scratch / "index")
    (scratch / "objects").mkdir()
    environment |= {
        "GIT_INDEX_FILE": str(scratch / "index"),
        "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects.resolve()),
    }

    untracked = _names(run("ls-files", "--others", "--exclude-standard", "-z", place=top))
    new, left_out = _small_ones(top, untracked)
    if new:
        lines = b"".join(os.fsencode(name) + b"\0" for name in new)
        add = ("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-")
        run(*add, "--pathspec-file-nul", lines=lines, place=top)

    # Whatever the user's own settings make of a diff, it must be one that `git apply` reads.
    plain = ("--no-ext-diff", "--no-textconv", "--no-renames", "--ignore-submodules=dirty")
    changed = _names(run("diff", *plain, "--name-only", "-z", commit, place=top))
    large = [name for name in changed if name not in new and _size(top / name) > MAX_BYTES]
    left_out += [f"{name!r} ({_size(top / name):,} bytes)" for name in large]
    patch = run(
        *("diff", *plain, "--no-color", "--binary", "--full-index", "--unified=3"),
        *("--src-prefix=a/", "--dst-prefix=b/", commit, "--", "."),
        *(f":(exclude,top,literal){name}" for name in large),
        place=top,
    )
    kept, too_long = _short_ones(patch)
    return kept, left_out + too_long


def _names(answer: bytes) -> list[str]:
    return [os.fsdecode(name) for name in answer.split(b"\0") if name]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0  # deleted


def _small_ones(top: Path, names: Iterable[str]) -> tuple[set[str], list[str]]:
    """New files that fit into the patch, the smallest first, and words on the others.

    Decided before git reads them: there may be a whole data set among them.
    """
    taken, left_out, room = set(), [], MAX_BYTES
    for size, name in sorted((_size(top / name), name) for name in names):
        readable = (top / name).is_symlink() or os.access(top / name, os.R_OK)
        if name.endswith("/"):
            left_out.append(f"{name!r} (a repository of its own)")
        elif size > room or not readable:
            left_out.append(f"{name!r} ({size:,} bytes{'' if readable else ', not readable'})")
        else:
            taken.add(name)
            room -= size
    return taken, left_out


def _short_ones(patch: bytes) -> tuple[bytes, list[str]]:
    """The part of each file that fits, in the order they came, and words on the others."""
    # A line of a file's content starts with a space, + or -; one of base85 holds no space.
    pieces = re.split(rb"^(?=diff --git )", patch, flags=re.MULTILINE)[1:]
    kept, left_out, room = set(), [], MAX_BYTES
    for number in sorted(range(len(pieces)), key=lambda number: len(pieces[number])):
        if len(pieces[number]) <= room:
            kept.add(number)
            room -= len(pieces[number])
        else:
            title = os.fsdecode(pieces[number].splitlines()[0].removeprefix(b"diff --git "))
            left_out.append(f"{title!r} ({len(pieces[number]):,} bytes of changes)")
    # While a merge is unfinished, git says so between the pieces.
    words = rb"^\* Unmerged path .*\n"
    whole = (re.sub(words, b"", pieces[number], flags=re.MULTILINE) for number in sorted(kept))
    return b"".join(whole), left_out
