"""Sampling: each filter by a case worked out by hand, and what sampling promises."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from app.commands.evaluate import Evaluate
from app.commands.generate import Generate
from app.commands.render import _JOB_KEYS, Render
from app.report.measure import DRAWN_BY
from app.web.session import Settings
from music_ar.decoding.sampling import SamplingError, SamplingOptions, filter_logits, sample
from music_ar.tokens import vocabulary

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, not in order.
CHANCES = np.array([0.125, 0.5, 0.0625, 0.25, 0.0625])


def kept(**options):
    """Indices that the filters keep of CHANCES, all off but those given."""
    all_off: dict[str, Any] = {"top_p": 1.0}
    filters = SamplingOptions(**(all_off | options)).filters()
    filtered = filter_logits(jnp.log(jnp.asarray(CHANCES))[None], filters)[0]
    return np.flatnonzero(np.isfinite(filtered)).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3, 4]),  # the fourth and the fifth are equally likely
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),  # 0.5 before the second is less than 0.6
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"min_p": 0.4}, [1, 3]),  # at least 0.4 * 0.5
        ({"min_p": 0.2}, [0, 1, 3]),
        ({"min_p": 1.0}, [1]),
        # Among the three likeliest the chances are 4/7, 2/7, 1/7, so 6/7 come before the third.
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 0.9, "min_p": 0.4}, [1, 3]),
        # At temperature 0.5 the chances go as 64, 16, 4, 1, 1: the first has 64/86 = 0.74.
        ({"temperature": 0.5, "top_p": 0.7}, [1]),
        ({"temperature": 0.5, "top_p": 0.8}, [1, 3]),
        ({"temperature": 0.5, "min_p": 0.2}, [1, 3]),
    ],
)
def test_filters_by_hand(options, expected):
    assert kept(**options) == expected


def test_kept_logits_are_divided_by_the_temperature():
    logits = jnp.array([[1.0, 2.0, 3.0]])
    filtered = filter_logits(logits, SamplingOptions(temperature=2.0, top_p=1.0, top_k=2).filters())
    np.testing.assert_allclose(filtered, [[-np.inf, 1.0, 1.5]])


def test_forbidden_tokens_stay_forbidden():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, -1.0]])
    filters = SamplingOptions(top_p=1.0, temperature=5.0).filters()
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = sample(keys, jnp.repeat(logits, 64, axis=0), filters)
    assert set(np.asarray(drawn).tolist()) == {1, 3}


def test_temperature_zero_ignores_the_key():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 391)), jnp.float32)
    filters = SamplingOptions(temperature=0.0).filters()
    drawn = sample(jax.random.split(jax.random.key(0), 16), jnp.repeat(logits, 16, axis=0), filters)
    assert set(np.asarray(drawn).tolist()) == {int(logits.argmax())}


def test_draws_follow_the_probabilities():
    keys = jax.random.split(jax.random.key(1), 8000)
    logits = jnp.repeat(jnp.log(jnp.asarray(CHANCES, jnp.float32))[None], 8000, axis=0)
    drawn = np.asarray(sample(keys, logits, SamplingOptions(top_p=1.0).filters()))
    shares = np.bincount(drawn, minlength=5) / 8000
    np.testing.assert_allclose(shares, CHANCES, atol=0.025)  # more than four standard deviations


def test_changed_options_compile_nothing_anew():
    compiled: Any = jax.jit(filter_logits)
    logits = jnp.zeros((1, 391))
    cases: list[dict[str, Any]] = [
        {},
        {"temperature": 0.3},
        {"top_k": 5, "top_p": 0.5},
        {"min_p": 0.1, "temperature": 0.0},
    ]
    for options in cases:
        compiled(logits, SamplingOptions(**options).filters())
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"steadiness": -0.1},
        {"steadiness": 1.5},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SamplingError, match=next(iter(options))):
        SamplingOptions(**options)


def test_each_kind_of_event_is_cut_by_itself():
    chances = np.full((1, vocabulary.VOCABULARY_SIZE), 1e-9)
    chances[0, [60, 61, 62]] = 0.6, 0.2, 0.1  # note-ons: 0.6 is less than 0.85 of 0.9, 0.8 is not
    shifts = vocabulary.TIME_SHIFT + np.arange(3)
    chances[0, shifts] = 0.06, 0.03, 0.01  # a kind below all of these: 0.06 is less than 0.085, 0.09 is not
    kept = filter_logits(jnp.log(jnp.asarray(chances, jnp.float32)), SamplingOptions(top_p=0.85).filters())
    kept = np.isfinite(np.asarray(kept[0]))
    assert kept[[60, 61, 62]].tolist() == [True, True, False]
    assert kept[shifts].tolist() == [True, True, False]


def test_a_kind_that_may_not_come_stays_away():
    logits = jnp.zeros((1, vocabulary.VOCABULARY_SIZE)).at[0, vocabulary.NOTE_OFF : vocabulary.TIME_SHIFT].set(-jnp.inf)
    kept = np.isfinite(np.asarray(filter_logits(logits, SamplingOptions(top_p=0.5).filters())[0]))
    assert not kept[vocabulary.NOTE_OFF : vocabulary.TIME_SHIFT].any()
    assert kept[: vocabulary.NOTE_OFF].all()  # equally likely ones stay together


CHOSEN: dict[str, Any] = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "steadiness": 0.6}


def test_what_is_chosen_anywhere_is_what_tokens_are_drawn_by(tmp_path):
    options = SamplingOptions(**CHOSEN)
    assert set(CHOSEN) == {field.name for field in dataclasses.fields(SamplingOptions)}
    assert SamplingOptions.of(vars(Generate(output=tmp_path / "a.mid", **CHOSEN))) == options
    assert Settings(**CHOSEN).sampling() == options
    assert set(CHOSEN) <= set(_JOB_KEYS)
    assert set(DRAWN_BY) <= {field.name for field in dataclasses.fields(Evaluate)} & set(CHOSEN)
    for command in (Generate, Render, Evaluate, Settings):
        defaults = {field.name: field.default for field in dataclasses.fields(command) if field.name in CHOSEN}
        assert defaults.items() <= vars(SamplingOptions()).items()
        assert len(defaults) >= 4
