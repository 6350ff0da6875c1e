"""Scores against one forward pass a token, for windows of many shapes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_performance, noisy_model
from reference_model import reference

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.evaluation.likelihood import (
    TOKEN_TYPES,
    ScoringConfig,
    score,
    score_by_type,
    score_decoding,
    score_tokens,
)
from music_ar.model.config import PRESETS
from music_ar.tokens import codec, vocabulary

CONFIG = dataclasses.replace(PRESETS["tiny"], context=12, latents=8, layers=1)
ALONE = ScoringConfig(stride=3, batch_size=1)


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture(scope="module")
def pieces():
    """Pieces shorter than a stride, than the latents, than the context, and longer, to the token and not."""
    encoded = codec.encode(make_performance(3))
    return [
        np.array([vocabulary.START, *encoded[:length], vocabulary.END], np.uint16)
        for length in (0, 1, 3, 6, 10, 11, 12, 37)
    ]


def brute_force(model, piece, context, latents, stride):
    """NLL of each target by a forward pass of its own, whose inputs and latents are counted from the definition."""
    nll = []
    for target in range(1, len(piece)):
        end = min(-(-target // stride) * stride, len(piece) - 1)  # the last target of this target's window
        first_input = max(0, end - context)
        first_latent = max(end - latents, first_input)
        logits = reference(model, piece[first_input:target], latents=target - first_latent)[-1]
        nll.append(np.log(np.exp(logits).sum()) - logits[piece[target]])
    return nll


@pytest.mark.parametrize(
    ("context", "latents", "stride"), [(None, None, 8), (12, 8, 3), (16, 5, 5), (8, 8, 4), (4, 1, 1)]
)
def test_equals_a_forward_pass_a_token(model, pieces, context, latents, stride):
    expected = [brute_force(model, piece, context or 12, latents or 8, stride) for piece in pieces]
    found = score(model, pieces, ScoringConfig(context=context, latents=latents, stride=stride, batch_size=7))
    assert found.nll == pytest.approx(sum(map(sum, expected)), rel=1e-4)
    assert found.tokens == sum(map(len, expected)) == sum(len(piece) - 1 for piece in pieces)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_windows_at_once_change_nothing(model, pieces, batch_size):
    expected = sum(sum(brute_force(model, piece, 12, 8, 3)) for piece in pieces)
    assert score(model, pieces, ScoringConfig(stride=3, batch_size=batch_size)).nll == pytest.approx(expected, rel=1e-5)


def test_pieces_are_scored_by_themselves(model, pieces):
    alone = [score(model, [piece], ALONE).nll for piece in pieces]
    assert score(model, pieces[::-1], ALONE).nll == pytest.approx(sum(alone), rel=1e-5)


def test_the_last_tokens_alone_cost_what_they_cost_among_all(model, pieces):
    piece = pieces[-1]
    (whole,) = score_tokens(model, [piece], ScoringConfig(stride=1, batch_size=50))
    assert whole.shape == (1, len(piece) - 1)
    np.testing.assert_allclose(whole[0], brute_force(model, piece, 12, 8, 1), rtol=1e-3)
    for count, stride in ((1, 1), (5, 1), (7, 7)):
        (found,) = score_tokens(model, [piece], ScoringConfig(stride=stride), last=[count])
        assert found.shape == (1, count)
        alike = slice(-1, None) if stride > 1 else slice(None)  # a window's last target is scored as at stride 1
        np.testing.assert_allclose(found[0, alike], whole[0, -count:][alike], rtol=1e-4)


def test_a_temperature_undoes_sharper_logits(model, pieces):
    sharper = noisy_model(CONFIG)
    sharper.head.kernel[...] *= 2
    assert sharper.head.bias is not None
    sharper.head.bias[...] *= 2
    plain = score_tokens(model, pieces, ScoringConfig(stride=8), temperatures=(0.5, 1.0))
    sharp = score_tokens(sharper, pieces, ScoringConfig(stride=8), temperatures=(1.0, 2.0))
    for one, other in zip(plain, sharp, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_each_token_type_has_its_share():
    types = {
        "note-on": [vocabulary.NOTE_ON, vocabulary.NOTE_OFF - 1],
        "note-off": [vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT - 1],
        "time shift": [vocabulary.TIME_SHIFT, vocabulary.VELOCITY - 1],
        "velocity": [vocabulary.VELOCITY, vocabulary.EVENT_CLASSES - 1],
        "end": [vocabulary.END],
    }
    piece = np.array([vocabulary.START, *(token for tokens in types.values() for token in tokens)], np.uint16)
    nll = np.array([1, 3, 2, 2, 4, 6, 0, 1, 1.0])
    found = score_by_type([nll], [piece])
    assert tuple(found) == TOKEN_TYPES == tuple(types)
    assert [of_type["nats_per_token"] for of_type in found.values()] == [2, 2, 5, 0.5, 1]
    assert [of_type["share"] for of_type in found.values()] == [0.2, 0.2, 0.5, 0.05, 0.05]
    assert [of_type["tokens"] for of_type in found.values()] == [2, 2, 2, 2, 1]
    assert list(score_by_type([nll[:2]], [piece[:3]])) == ["note-on"]


def test_the_metrics_are_per_token_note_and_second(model):
    performance = make_performance(1, notes=10)
    piece = np.array([vocabulary.START, *codec.encode(performance), vocabulary.END], np.int32)
    found = score(model, [piece, piece], ScoringConfig(stride=8))
    metrics = found.metrics()
    assert metrics["tokens"] == 2 * (len(piece) - 1)
    assert metrics["notes"] == 20
    assert metrics["seconds"] == pytest.approx(2 * performance.duration_s, abs=0.01)
    for unit in ("token", "note", "second"):
        assert metrics[f"nats_per_{unit}"] * metrics[f"{unit}s"] == pytest.approx(found.nll)


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(pieces):
    uniform = noisy_model(CONFIG)
    uniform.head.kernel[...] = jnp.zeros_like(uniform.head.kernel[...])
    assert uniform.head.bias is not None
    uniform.head.bias[...] = jnp.zeros_like(uniform.head.bias[...])
    assert score(uniform, pieces, ScoringConfig(stride=8)).nats_per_token == pytest.approx(
        np.log(vocabulary.VOCABULARY_SIZE), rel=1e-6
    )


def test_progress_rises_to_one(model, pieces):
    shares = []
    score(model, pieces, ALONE, on_progress=shares.append)
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"stride": 0}, "got 0, 8, 12"),
        ({"stride": 9}, "got 9, 8, 12"),
        ({"stride": 1, "latents": 13}, "got 1, 13, 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model, pieces, sizes, message):
    with pytest.raises(ValueError, match=message):
        score(model, pieces, ScoringConfig(**sizes))


def test_nothing_to_score_is_refused(model):
    with pytest.raises(ValueError, match="at least one piece"):
        score(model, [], ScoringConfig(stride=8))
    with pytest.raises(ValueError, match="a start and an end"):
        score(model, [np.array([vocabulary.START])], ScoringConfig(stride=8))
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.390, got 3\.\.391"):
        score(model, [np.array([vocabulary.START, 3, vocabulary.VOCABULARY_SIZE])], ScoringConfig(stride=8))


def test_scoring_through_the_decoder(model):
    """Token by token through the caches, for pieces of many lengths at once, beyond the window of latents."""
    latents, encoded = 4, codec.encode(make_performance(3))
    pieces = [np.array([vocabulary.START, *encoded[:length], vocabulary.END], np.uint16) for length in (1, 6, 11)]
    nll = []
    for piece in pieces:  # none is longer than the context, so that the model as trained is the reference
        for target in range(1, len(piece)):
            first_latent = max((target - 1) // (latents // 2) - 1, 0) * (latents // 2)
            logits = reference(model, piece[:target], latents=target - first_latent)[-1]
            nll.append(np.log(np.exp(logits).sum()) - logits[piece[target]])
    found = score_decoding(Decoder(model, Backend()), pieces, latents=latents, mode="exact", batch_size=2)
    assert found.tokens == len(nll)
    assert found.nll == pytest.approx(sum(nll), rel=1e-4)
