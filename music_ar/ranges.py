"""What values an option may have: declared in a dataclass field, checked when the object is made, said in one sentence.

seconds: float = number(60.0, above=0, most=86_400)

def __post_init__(self) -> None:
    check_ranges(self, GenerationError)
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Callable
from typing import Any, NoReturn

MAX_SEED = 2**31 - 1
MAX_SECONDS = 24 * 3600.0
"""Longest music to generate at once: a day. With the longest prompt that is read, it still fits in a MIDI file."""

_RANGE = "range"
_SHOWN_CHARACTERS = 40
_SHOWN_DIGITS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The values that an option may have.

    Attributes:
        whole: whether only whole numbers are allowed.
        least: lowest value.
        most: highest value; infinity itself is never allowed.
        above: whether `least` itself is left out.
        optional: whether None is allowed too.
        words: texts that are allowed in place of a number.
    """

    whole: bool
    least: int | float
    most: int | float = math.inf
    above: bool = False
    optional: bool = False
    words: tuple[str, ...] = ()

    def __contains__(self, value: Any) -> bool:
        if value is None or isinstance(value, str):
            return self.optional if value is None else value in self.words
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.whole else numbers.Real):
            return False
        # Compared as it is: a whole number of hundreds of digits does not fit in a float, and NaN equals nothing.
        given: Any = value
        reached = given > self.least if self.above else given >= self.least
        return bool(reached and given <= self.most and given != math.inf)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        least, most = shown(self.least), shown(self.most)
        if self.above:
            text = f"{kind} above {least}" + ("" if self.most == math.inf else f" and at most {most}")
        else:
            text = f"{kind} of at least {least}" if self.most == math.inf else f"{kind} from {least} to {most}"
        return ", or ".join([text, *self.words])

    def plain(self, value: Any) -> Any:
        """An allowed value as Python's own number, also if it is NumPy's or a negative zero."""
        if value is None or isinstance(value, str):
            return value
        return int(value) if self.whole else float(value) + 0.0


def number(
    default: Any = dataclasses.MISSING,
    *,
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float = math.inf,
    whole: bool = False,
    words: tuple[str, ...] = (),
    **metadata: Any,
) -> Any:
    """A dataclass field for a number, or for a tuple of numbers.

    Args:
        default: the field's default; where it is None, None is allowed.
        least: lowest value; give either this or `above`.
        above: what the value must exceed.
        most: highest value.
        whole: whether only whole numbers are allowed.
        words: texts that are allowed in place of a number.
        metadata: further metadata of the field.
    """
    if (least is None) == (above is None):
        raise TypeError("give either least or above")
    bound = least if above is None else above
    assert bound is not None
    allowed = Range(whole=whole, least=bound, most=most, above=above is not None, optional=default is None, words=words)
    return dataclasses.field(default=default, metadata={_RANGE: allowed, **metadata})


def whole(
    default: Any = dataclasses.MISSING,
    least: int = 0,
    most: int | float = math.inf,
    *,
    words: tuple[str, ...] = (),
    **metadata: Any,
) -> Any:
    """A dataclass field for a whole number; see `number`."""
    return number(default, least=least, most=most, whole=True, words=words, **metadata)


def check_ranges(options: Any, error: type[ValueError], *, name: Callable[[str], str] = str) -> None:
    """Check the fields of a dataclass that `number` and `whole` declare. Call it in `__post_init__`.

    Args:
        options: the dataclass object. Its numbers become Python's own.
        error: what to raise.
        name: gives a field's name as the user knows it.

    Raises:
        ValueError: of the type `error`: a value is out of its range.
    """
    for field in dataclasses.fields(options):
        allowed, value = field.metadata.get(_RANGE), getattr(options, field.name)
        if allowed is None:
            continue
        several = isinstance(value, tuple)
        for each in value if several else (value,):
            if each not in allowed:
                refuse(name(field.name), str(allowed), each, error)
        plain = tuple(map(allowed.plain, value)) if several else allowed.plain(value)
        object.__setattr__(options, field.name, plain)


def refuse(name: str, expected: str, value: Any, error: type[ValueError]) -> NoReturn:
    """Raise `error` with the one sentence that all refused values get."""
    raise error(f"{name} must be {expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as an error message shows it: short, on one line, in characters that can be printed."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, numbers.Integral):
        whole_number = int(value)
        is_short = abs(whole_number) < 10**_SHOWN_DIGITS
        return str(whole_number) if is_short else f"a number of {_digits(abs(whole_number))} digits"
    if isinstance(value, numbers.Real):
        return repr(float(value)).removesuffix(".0")
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}…"
        return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return {"list": "a list", "tuple": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)


def _digits(value: int) -> int:
    """Number of decimal digits; Python itself refuses to write more than 4300."""
    digits = int((value.bit_length() - 1) * math.log10(2)) + 1
    return digits + (value >= 10**digits)
