"""Ranges of options: what is allowed, and the one sentence about what is not."""

import dataclasses
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from music_ar.ranges import check_ranges, number, shown, whole


class OptionError(ValueError):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    count: int = whole(1, 1, 10)
    share: float = number(0.5, least=0, most=1)
    length: float = number(1.0, above=0)
    size: int | str | None = whole(None, 2, words=("auto",))
    sizes: tuple[int, ...] = whole((), 1)
    note: str = "anything"

    def __post_init__(self) -> None:
        check_ranges(self, OptionError, name=lambda name: f"--{name}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--count must be a whole number from 1 to 10, got 0"),
        ({"count": 11}, "--count must be a whole number from 1 to 10, got 11"),
        ({"count": 2.0}, "--count must be a whole number from 1 to 10, got 2"),
        ({"count": True}, "--count must be a whole number from 1 to 10, got true"),
        ({"count": None}, "--count must be a whole number from 1 to 10, got nothing"),
        ({"count": 10**400}, "--count must be a whole number from 1 to 10, got a number of 401 digits"),
        ({"count": 10**400 - 1}, "--count must be a whole number from 1 to 10, got a number of 400 digits"),
        ({"count": 10**20}, "--count must be a whole number from 1 to 10, got a number of 21 digits"),
        ({"count": 10**20 - 1}, "--count must be a whole number from 1 to 10, got 99999999999999999999"),
        ({"count": -(10**6000)}, "--count must be a whole number from 1 to 10, got a number of 6001 digits"),
        ({"share": 1.01}, "--share must be a number from 0 to 1, got 1.01"),
        ({"share": math.nan}, "--share must be a number from 0 to 1, got nan"),
        ({"share": "0.5"}, '--share must be a number from 0 to 1, got "0.5"'),
        ({"share": [0.5]}, "--share must be a number from 0 to 1, got a list"),
        ({"share": 1j}, "--share must be a number from 0 to 1, got complex"),
        ({"length": 0}, "--length must be a number above 0, got 0"),
        ({"length": -0.0}, "--length must be a number above 0, got -0"),
        ({"length": math.inf}, "--length must be a number above 0, got inf"),
        ({"size": "Auto"}, '--size must be a whole number of at least 2, or auto, got "Auto"'),
        ({"size": 1}, "--size must be a whole number of at least 2, or auto, got 1"),
        ({"sizes": (3, 0)}, "--sizes must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_refused_in_a_sentence(options, message):
    with pytest.raises(OptionError) as caught:
        Options(**options)
    assert str(caught.value) == message


def test_numbers_become_pythons_own():
    given: dict[str, Any] = {"count": np.int64(3), "share": np.float32(0.5), "size": np.int32(4)}
    options = Options(**given, length=2, sizes=(cast("int", np.uint8(7)),))
    assert options == Options(count=3, share=0.5, length=2.0, size=4, sizes=(7,))
    values = [options.count, options.share, options.length, options.size, *options.sizes]
    assert [type(value) for value in values] == [int, float, float, int, int]
    assert math.copysign(1, Options(share=-0.0).share) == 1
    assert Options(size="auto").size == "auto"


@given(st.integers() | st.floats() | st.text() | st.booleans() | st.none() | st.binary() | st.complex_numbers())
def test_any_value_is_shown_on_one_short_printable_line(value):
    text = shown(value)
    assert text
    assert len(text) < 300
    assert "\n" not in text
    text.encode()


@pytest.mark.parametrize(
    ("value", "text"), [("\ud800\n", r'"\ud800\n"'), ("é" * 99, f'"{"é" * 40}…"'), (2**64, "18446744073709551616")]
)
def test_texts_are_escaped_and_cut(value, text):
    assert shown(value) == text
