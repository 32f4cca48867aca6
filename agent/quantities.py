"""Sizes and durations as people write them: Kubernetes quantities, Go durations. Pure."""

import re
from decimal import Decimal

_UNITS = {"": 1, "k": 1000}
for _power, _unit in enumerate("KMGTP", 1):
    _UNITS |= {_unit: 1000**_power, f"{_unit}i": 1024**_power}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([KMGTPk]?i?)B?")

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")


def parse_size(text: str) -> int:
    """Bytes from a quantity as Kubernetes writes it: `500Gi`, `1.5T`, `1048576`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 500Gi, 1.5T or 1048576")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def parse_duration(text: str) -> float:
    """Seconds from a duration as Go writes it: `90s`, `1h30m`, `0s`; and `7d`, which Go lacks."""
    stripped = text.strip()
    parts = _PART.findall(stripped)
    if not parts or "".join(number + unit for number, unit in parts) != stripped:
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 1h30m or 7d")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def duration(seconds: float) -> str:
    """A duration as people read it, in its two largest units: 3d4h, 12m, 45s."""
    rest, found = max(0, int(seconds)), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not found):
            found.append(f"{count}{unit}")
    return "".join(found[:2])
