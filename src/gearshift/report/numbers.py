"""Numbers for people: three significant digits and a unit. The exact values are in report.json."""

import math
import re

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None) -> str:
    """`0.0421`, `3.14`, `1,234`, `1.2 × 10⁻⁶`: three significant digits, whole numbers in full up to a million."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        mantissa, exponent = f"{size:.2e}".split("e")
        text = f"{float(mantissa):g} {TIMES} 10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    elif size >= 999.5:
        text = f"{size:,.0f}"
    else:
        size = float(f"{size:.3g}")
        text = f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return MINUS + text if value < 0 else text


def setting(value: float | None) -> str:
    """`0.003`: what a person chose, without the zeros that a measurement would have."""
    return MISSING if value is None else f"{value:g}"


def scaled(value: float | None, units: tuple[str, ...]) -> str:
    """The value in the largest of `units`, each a thousand of the one before, that keeps it at least 1."""
    if value is None or not math.isfinite(value):
        return MISSING
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    text = f"{value:.0f}" if not power and value == int(value) else number(value)
    return f"{text} {units[power]}".rstrip()


def size(bytes_: float | None) -> str:
    """`61.4 MB`; a MB is a million bytes."""
    return scaled(bytes_, ("B", "KB", "MB", "GB", "TB"))


def count(value: float | None) -> str:
    """`135 M`."""
    return scaled(value, ("", "K", "M", "B", "T"))


def percent(share: float | None) -> str:
    """`41%`; below 10% with a digit more."""
    if share is None or not math.isfinite(share):
        return MISSING
    text = f"{abs(share) * 100:.{0 if abs(share) >= 0.0995 else 1}f}%"
    return (MINUS if share < 0 and text.strip("0.%") else "") + text


def change(before: float | None, after: float | None) -> str:
    """What became of a number: `−38%`, `+4%`, `0%`."""
    if before is None or after is None or before == 0:
        return MISSING if before is None or after is None or after else "0%"
    text = percent(after / before - 1)
    return f"+{text}" if after > before and text.strip("0.%") else text


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole where both are known and whole is not 0."""
    return part / whole if part is not None and whole else None


def duration(seconds: float | None) -> str:
    """`0.42 s`, `12.3 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def cost(value: float | None, unit: str) -> str:
    """A cost without the words that follow: sizes where the unit counts bytes."""
    return size(value) if counts_bytes(unit) else number(value)


def cost_words(unit: str) -> str:
    """The words that follow a cost: `a token at 8,192 tokens of context`."""
    return unit_words(unit.partition(" ")[2] if counts_bytes(unit) else unit)


def unit_words(unit: str) -> str:
    """A unit whose numbers are grouped: `bytes a token at 8,192 tokens of context`."""
    return re.sub(r"\d{4,}", lambda found: f"{int(found[0]):,}", unit)


def counts_bytes(unit: str) -> bool:
    """Whether a cost's unit counts bytes."""
    return unit.partition(" ")[0] == "bytes"
