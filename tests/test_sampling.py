"""`SamplingOptions`: ranges, and what describes an option wherever it is shown."""

import dataclasses
import inspect
import re

import pytest

from music_ar.decoding.sampling import OPTION_NAMES, SamplingError, SamplingOptions

FIELDS = dataclasses.fields(SamplingOptions)


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": True},
        {"temperature": "1"},
        {"temperature": None},
        {"top_k": 2**40},
        {"top_k": 5.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"min_p": -0.1},
        {"steadiness": -0.1},
        {"steadiness": 1.5},
    ],
)
def test_options_out_of_range_are_refused(options):
    [name] = options
    with pytest.raises(SamplingError, match=name):
        SamplingOptions(**options)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_each_option_describes_its_control(field):
    assert set(field.metadata) == {"range", "label", "minimum", "maximum", "step"}
    least, most, step = (field.metadata[name] for name in ("minimum", "maximum", "step"))
    assert least <= field.default <= most
    assert 0 < step <= most - least
    for value in (least, most):
        assert getattr(SamplingOptions(**{field.name: value}), field.name) == value  # the whole range is valid
    assert {type(field.default), type(step)} == {field.type}


def test_each_option_has_a_help_text():
    described = re.findall(r"^    (\w+): \S", inspect.getdoc(SamplingOptions) or "", re.MULTILINE)
    assert [name for name in described if name in OPTION_NAMES] == [field.name for field in FIELDS]
    assert tuple(field.name for field in FIELDS) == OPTION_NAMES
