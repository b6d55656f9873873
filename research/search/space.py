"""What is searched through: classes that bring ranges of their own, ranges of numbers, lists.

    log 1e-4..1          real, drawn evenly in its logarithm
    0..0.5 step 0.1      real, at these points only (0..0.5: anywhere)
    int 1..8             whole; also `int log 16..512` and `int 0..100 step 10`
    [64, 128, 256]       one of these
    {SGD: {lr: log 1e-3..1}, AdamW: {lr: log 1e-5..0.1, weight_decay: 0.01}}
                         one of these classes, each with arguments of its own
    [SGD, AdamW]         one of these classes

Optuna's name of a parameter is its key on the command line (`data.batch_size`); one that only a
class of the space has goes by that class too (`optimizer.SGD.lr`), because to Optuna one name can
mean one range only.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from research.configuration.compose import unfold

ALL = "all"  # as the name of a class: every known one that is not named beside it
NONE = "none"  # a schedule may be none
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
RANGE = re.compile(
    rf"(?P<int>int\s+)?(?P<log>log\s+)?(?P<low>{NUMBER})\s*\.\.\s*(?P<high>{NUMBER})"
    rf"(?:\s+step\s+(?P<step>{NUMBER}))?"
)
# What was meant to be a range, and no path such as ../data.
MEANT_AS_RANGE = re.compile(r"(int|log)\s|[-+]?\.?\d[^/]*\.\.|[^/]*\.\.\s*[-+]?\.?\d[^/]*$")
LARGEST_INT = 2**53  # Optuna keeps whole numbers as floats


@dataclass(frozen=True)
class Parameter:
    """One dimension of the space."""

    name: str  # Optuna's: optimizer.SGD.lr
    key: str  # the command line's: optimizer.lr
    distribution: BaseDistribution
    condition: tuple[str, str] | None = None  # ("optimizer", "SGD"): there only
    values: tuple[Any, ...] = ()  # what the choices stand for, where Optuna cannot hold that

    def value(self, drawn: Any) -> Any:
        """The setting's value for what Optuna drew."""
        if not self.values:
            return drawn
        assert isinstance(self.distribution, CategoricalDistribution)
        return self.values[self.distribution.choices.index(drawn)]

    def written(self) -> str | list[Any]:
        """As it stands in a search file."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.values or self.distribution.choices)
        return notation(self.distribution)


@dataclass(frozen=True)
class Fixed:
    """An argument of one value; with a condition, of one class of the space only."""

    key: str
    value: Any
    condition: tuple[str, str] | None = None


@dataclass(frozen=True)
class Space:
    """The parameters of a study in the order in which they are drawn: classes before arguments."""

    drawn: tuple[Parameter, ...]
    fixed: tuple[Fixed, ...] = ()

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The trial's settings, nested, drawn from Optuna."""
        params: dict[str, Any] = {}
        for parameter in self.drawn:
            if holds(parameter.condition, params):
                params[parameter.name] = draw(trial, parameter.name, parameter.distribution)
        return self.settings(params)

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The same settings, of what was drawn before."""
        flat: dict[str, Any] = {}
        for parameter in self.drawn:
            if holds(parameter.condition, params):
                if parameter.name not in params:
                    raise ValueError(
                        f"{parameter.name} is missing among a trial's parameters, "
                        f"{', '.join(params) or 'none'}; it is a trial of another search, or died "
                        "while its parameters were drawn."
                    )
                flat[parameter.key] = parameter.value(params[parameter.name])
        for fixed in self.fixed:
            if holds(fixed.condition, params):
                flat[fixed.key] = fixed.value
        return unfold(flat)

    def parameters(self) -> list[Parameter]:
        return list(self.drawn)

    def parameter(self, name: str) -> Parameter:
        """Raises KeyError where there is none of that name."""
        return {parameter.name: parameter for parameter in self.drawn}[name]

    def is_conditional(self) -> bool:
        return any(parameter.condition is not None for parameter in self.drawn)

    def points(self) -> int | None:
        """How many different trials there can be; None where a range has no step."""
        counts: dict[tuple[str, str] | None, int] = {None: 1}
        for parameter in self.drawn:
            count = len_of(parameter.distribution)
            if count is None:
                return None
            condition = parameter.condition
            counts[condition] = counts.get(condition, 1) * count
        total = counts.pop(None)
        for choice in {name for name, _ in filter(None, counts)}:
            classes = self.parameter(choice).distribution
            assert isinstance(classes, CategoricalDistribution)
            total //= len(classes.choices)
            total *= sum(counts.get((choice, str(name)), 1) for name in classes.choices)
        return total

    def grid(self) -> dict[str, list[Any]]:
        """All values of every parameter by its name, as GridSampler wants them."""
        return {parameter.name: values_of(parameter.distribution) for parameter in self.drawn}

    def canonical(self) -> dict[str, Any]:
        """JSON-able; equal for equal spaces, whatever the order in which they were written."""
        described: dict[str, Any] = {p.name: p.written() for p in self.drawn}
        for fixed in self.fixed:
            described[named(fixed.key, fixed.condition)] = {"fixed": fixed.value}
        return dict(sorted(described.items()))


def holds(condition: tuple[str, str] | None, params: Mapping[str, Any]) -> bool:
    return condition is None or params.get(condition[0]) == condition[1]


def named(key: str, condition: tuple[str, str] | None) -> str:
    """Optuna's name: optimizer.SGD.lr of optimizer.lr that holds for SGD only."""
    if condition is None:
        return key
    return f"{condition[0]}.{condition[1]}.{key.removeprefix(f'{condition[0]}.')}"


def draw(trial: BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        low, high, step, log = (getattr(distribution, a) for a in ("low", "high", "step", "log"))
        return trial.suggest_float(name, low, high, step=step, log=log)
    if isinstance(distribution, IntDistribution):
        low, high, step, log = (getattr(distribution, a) for a in ("low", "high", "step", "log"))
        return trial.suggest_int(name, low, high, step=step, log=log)
    assert isinstance(distribution, CategoricalDistribution)
    return trial.suggest_categorical(name, distribution.choices)


def len_of(distribution: BaseDistribution) -> int | None:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.step is None:
        return None
    span = Decimal(str(distribution.high)) - Decimal(str(distribution.low))
    return int(span / Decimal(str(distribution.step))) + 1


def values_of(distribution: BaseDistribution) -> list[Any]:
    """Every value of a list, or of a range with steps."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    count = len_of(distribution)
    assert count is not None
    kind = int if isinstance(distribution, IntDistribution) else float
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    return [kind(low + i * step) for i in range(count)]


# ---- reading -------------------------------------------------------------------------------------


def read_parameter(
    key: str, value: Any, condition: tuple[str, str] | None = None
) -> Parameter | None:
    """The parameter that a range or a list stands for; None for a plain value.

    ValueError for a range or a list that holds nothing, in a sentence without the key.
    """
    name = named(key, condition)
    if isinstance(value, list):
        choices, values = read_list(value)
        return Parameter(name, key, CategoricalDistribution(choices), condition, values)
    if isinstance(value, str) and MEANT_AS_RANGE.match(value):
        return Parameter(name, key, read_range(value), condition)
    return None


def read_range(text: str) -> FloatDistribution | IntDistribution:
    """What `log 1e-4..1` and its like say; ValueError, without the key, for an empty range."""
    found = RANGE.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f'"{text}" is no range; ranges are written 0..0.5, 0..0.5 step 0.1, log 1e-4..1, '
            "int 1..8, int log 16..512 or int 0..100 step 10"
        )
    whole, log = found["int"] is not None, found["log"] is not None
    numbers = {name: Decimal(found[name]) for name in ("low", "high", "step") if found[name]}
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    if any(not math.isfinite(float(number)) for number in numbers.values()):
        raise ValueError(f'"{text}" has a number that is too large')
    if whole and any(number != int(number) for number in numbers.values()):
        raise ValueError(f'"{text}" is of whole numbers; leave out int for a range of real ones')
    if whole and any(abs(number) > LARGEST_INT for number in numbers.values()):
        raise ValueError(f'"{text}" has a whole number above {LARGEST_INT:,}')
    if low > high:
        raise ValueError(f'"{text}" goes down; write the lower end first: {found["high"]}..'
                         f'{found["low"]}')  # fmt: skip
    if low == high or float(low) == float(high):
        raise ValueError(f'"{text}" holds one number only; a fixed value goes into settings')
    if log and (low <= 0 or float(low) == 0):
        raise ValueError(f'"{text}" is logarithmic, so it must begin above 0')
    if log and step is not None:
        raise ValueError(f'"{text}" is logarithmic, so it can have no step')
    if step is not None and (step <= 0 or float(step) == 0):
        raise ValueError(f'"{text}" has a step of {found["step"]}; it must be above 0')
    if step is not None and step > high - low:
        raise ValueError(f'"{text}" has a step that is larger than the range')
    if step is not None:
        high = low + (high - low) // step * step  # the last point, as Optuna would cut it
    if whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(
        float(low), float(high), log=log, step=None if step is None else float(step)
    )


def read_list(values: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Optuna's choices, and what they stand for: () where they are the values themselves.

    A list or mapping among the values goes by its JSON text.  ValueError for no or equal values.
    """
    if not values:
        raise ValueError("the list is empty; write at least one value, as [64, 128]")
    texts = [json.dumps(value, sort_keys=True) for value in values]
    twice = [text for i, text in enumerate(texts) if text in texts[:i]]
    if twice:
        raise ValueError(f"{twice[0]} comes twice in the list")
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in values)
    if plain and len(set(values)) == len(values):  # 1, 1.0 and true are one choice to Optuna
        return tuple(values), ()
    return tuple(texts), tuple(values)


def notation(distribution: BaseDistribution) -> str:
    """The range as a search file writes it; `read_range` gives the same back."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    whole = isinstance(distribution, IntDistribution)
    text = "int " * whole + "log " * distribution.log
    text += f"{number(distribution.low)}..{number(distribution.high)}"
    if distribution.step is None or (whole and distribution.step == 1):
        return text
    return f"{text} step {number(distribution.step)}"


def number(value: float) -> str:
    """The shortest text that reads as the same number: 1e-5, 0.1, 3."""
    mantissa, e, exponent = repr(value).partition("e")
    mantissa = mantissa.removesuffix(".0")
    return f"{mantissa}e{int(exponent)}" if e else mantissa
