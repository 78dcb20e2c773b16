"""Numbers as text for people. Rounding must not change the meaning: 0.9996 is not 100%, and 0.0004 is not 0%."""

from __future__ import annotations

MAX_DIGITS = 12
MINUS = "\N{MINUS SIGN}"


def signed(value: float, digits: int) -> str:
    """A number with its sign; the minus is typographic, and a number that rounds to 0 is +0.

    >>> signed(-0.0004, 3), signed(-1.5, 1)
    ('+0.000', '\N{MINUS SIGN}1.5')
    """
    return f"{value:+z.{digits}f}".replace("-", MINUS)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage, with enough digits to differ from 0% and 100%.

    >>> percent(0.7), percent(1.0), percent(0.9996), percent(0.0), percent(0.0004)
    ('70.0%', '100%', '99.96%', '0%', '0.04%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    while digits < MAX_DIGITS and round(share, digits + 2) in (0.0, 1.0):
        digits += 1
    return f"{share:.{digits}%}"


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour.

    >>> clock(59.6), clock(3723)
    ('1:00', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def age(seconds: float) -> str:
    """A duration in its largest whole unit.

    >>> age(4.2), age(119), age(7200), age(200_000)
    ('4 s', '1 min', '2 h', '2 d')
    """
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"
