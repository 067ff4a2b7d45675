"""Numbers as people read them."""

MINUS = "\u2212"


def quantity(value: float, unit: str) -> str:
    """A number with a prefix: powers of 1024 for bytes, of 1000 otherwise. unit: empty for a count."""
    base, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "k", "M", "G", "T", "P"))
    prefixes = prefixes if unit else ("", "k", "M", "B", "T")  # billions of parameters
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 and float(value).is_integer() else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()


def change(before: float, after: float) -> str:
    """A change in percent, always with its sign; empty if `before` is 0."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", MINUS) if before else ""
