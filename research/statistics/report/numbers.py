"""How numbers are written in a report: the same on the page, in tables and at axes.

Shares of 1 (accuracies) are in percent with two digits; losses and times have three significant
digits; what is no finite number is "not finite", and what is not there is a dash.
"""

import math

from research.statistics.interval import Interval

SHARES = ("accuracy", "error", "precision", "recall", "f1", "share")
NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def is_share(metric: str) -> bool:
    """True for a metric between 0 and 1 that is told in percent."""
    _, _, name = metric.lower().partition("/")  # test/accuracy, or of a class: test/accuracy/cat
    name = name.partition("/")[0] or metric.lower()
    return any(word in name for word in SHARES)


def value(number: float | None, metric: str, digits: int = 2) -> str:
    """`66.31 %`, or `1.05` for what is no share."""
    if number is None:
        return NONE
    if not math.isfinite(number):
        return "not finite"
    if is_share(metric):
        return f"{signed(100 * number, digits)} %"
    return significant(number)


def bare(number: float | None, metric: str) -> str:
    """The same without its unit: for a cell below a header that says it."""
    return value(number, metric).removesuffix(" %")


def difference(number: float | None, metric: str) -> str:
    """`+0.61`, in points of a percent for shares."""
    if number is None:
        return NONE
    text = bare(number, metric)
    is_above = number > 0 and any(digit in text for digit in "123456789")
    return f"+{text}" if is_above else text


def interval(found: Interval | None, metric: str, *, sign: bool = False) -> str:
    """`66.02 to 66.60`; a dash where there is none."""
    if found is None:
        return NONE
    write = difference if sign else bare
    return f"{write(found.low, metric)} to {write(found.high, metric)}"


def unit(metric: str) -> str:
    """What stands in a header behind the metric's name."""
    return "%" if is_share(metric) else ""


def probability(number: float | None) -> str:
    """A p-value: `0.031`, `<0.001`."""
    if number is None or math.isnan(number):
        return NONE
    if number < 0.001:
        return "<0.001"
    return f"{number:.3f}" if number < 0.1 else f"{number:.2f}"


def share(number: float | None) -> str:
    """A share in whole percents: `87 %`."""
    if number is None or not math.isfinite(number):
        return NONE
    return f"{100 * number:.0f} %"


def shares(number: float, found: Interval) -> str:
    """`87 % (62 to 99)`."""
    return f"{share(number)} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def rate(number: float) -> str:
    """A learning rate: `0.03`, `1e-4`."""
    if 1e-3 <= number < 1e4:
        return f"{number:.2g}"
    digits, exponent = f"{number:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def time(number: float) -> str:
    """Epochs or seconds: whole where they are, three significant digits otherwise."""
    return f"{number:.0f}" if number == round(number) else significant(number)


def significant(number: float, digits: int = 3) -> str:
    """Three significant digits and a real minus sign; thousands are parted by thin spaces."""
    if not math.isfinite(number):
        return "not finite"
    if number != 0 and not 1e-4 <= abs(number) < 1e6:
        return f"{number:.{digits - 1}e}".replace("-", MINUS)
    places = digits - 1 - math.floor(math.log10(abs(number))) if number else digits - 1
    return f"{number:,.{max(places, 0)}f}".replace("-", MINUS).replace(",", "\N{THIN SPACE}")


def signed(number: float, digits: int) -> str:
    """The number with so many digits; no zero is negative."""
    text = f"{number:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)
