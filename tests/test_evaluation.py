"""Scores against one forward pass a token, for windows of many shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_performance, noisy_model
from flax import nnx
from reference_model import reference

from music_ar.decoding.decoder import Decoder
from music_ar.evaluation.calibration import best_temperature, calibrated
from music_ar.evaluation.likelihood import KINDS, score, score_decoding, score_kinds, score_tokens
from music_ar.model.config import PRESETS
from music_ar.tokens import codec, vocabulary

CONFIG = dataclasses.replace(PRESETS["tiny"], context=12, latents=8, layers=1)


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
    """Nats of each target by a forward pass of its own, whose inputs and latents are counted from the definition."""
    nats = []
    for target in range(1, len(piece)):
        end = min(-(-target // stride) * stride, len(piece) - 1)  # the last target of this target's window
        first_input = max(0, end - context)
        first_latent = max(end - latents, first_input)
        logits = reference(model, piece[first_input:target], latents=target - first_latent)[-1]
        nats.append(np.log(np.exp(logits).sum()) - logits[piece[target]])
    return nats


@pytest.mark.parametrize(
    ("context", "latents", "stride"), [(None, None, 8), (12, 8, 3), (16, 5, 5), (8, 8, 4), (4, 1, 1)]
)
def test_equals_a_forward_pass_a_token(model, pieces, context, latents, stride):
    expected = [brute_force(model, piece, context or 12, latents or 8, stride) for piece in pieces]
    found = score(model, pieces, context=context, latents=latents, stride=stride, batch_size=7)
    assert found.nats == pytest.approx(sum(map(sum, expected)), rel=1e-4)
    assert found.tokens == sum(map(len, expected)) == sum(len(piece) - 1 for piece in pieces)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_windows_at_once_change_nothing(model, pieces, batch_size):
    expected = sum(sum(brute_force(model, piece, 12, 8, 3)) for piece in pieces)
    assert score(model, pieces, stride=3, batch_size=batch_size).nats == pytest.approx(expected, rel=1e-5)


def test_pieces_are_scored_by_themselves(model, pieces):
    alone = [score(model, [piece], stride=3, batch_size=1).nats for piece in pieces]
    assert score(model, pieces[::-1], stride=3, batch_size=1).nats == pytest.approx(sum(alone), rel=1e-5)


def test_the_last_tokens_alone_cost_what_they_cost_among_all(model, pieces):
    piece = pieces[-1]
    (whole,) = score_tokens(model, [piece], stride=1, batch_size=50)
    assert whole.shape == (1, len(piece) - 1)
    np.testing.assert_allclose(whole[0], brute_force(model, piece, 12, 8, 1), rtol=1e-3)
    for count, stride in ((1, 1), (5, 1), (7, 7)):
        (found,) = score_tokens(model, [piece], stride=stride, last=[count])
        assert found.shape == (1, count)
        alike = slice(-1, None) if stride > 1 else slice(None)  # a window's last target is scored as at stride 1
        np.testing.assert_allclose(found[0, alike], whole[0, -count:][alike], rtol=1e-4)


def test_a_temperature_undoes_sharper_logits(model, pieces):
    sharper = noisy_model(CONFIG)
    sharper.head.kernel[...] *= 2
    assert sharper.head.bias is not None
    sharper.head.bias[...] *= 2
    plain = score_tokens(model, pieces, stride=8, temperatures=(0.5, 1.0))
    sharp = score_tokens(sharper, pieces, stride=8, temperatures=(1.0, 2.0))
    for one, other in zip(plain, sharp, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_the_best_temperature_is_the_vertex_or_an_end():
    temperatures = np.array([0.8, 0.9, 1.0, 1.1, 1.2])
    nats = 3 + 5 * (temperatures - 0.97) ** 2
    assert best_temperature(list(temperatures), nats) == pytest.approx((0.97, 3.0))
    assert best_temperature(list(temperatures), temperatures) == pytest.approx((0.8, 0.8))
    assert best_temperature(list(temperatures), -temperatures) == pytest.approx((1.2, -1.2))


def test_each_kind_of_event_has_its_share():
    kinds = {
        "note-on": [vocabulary.NOTE_ON, vocabulary.NOTE_OFF - 1],
        "note-off": [vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT - 1],
        "time shift": [vocabulary.TIME_SHIFT, vocabulary.VELOCITY - 1],
        "velocity": [vocabulary.VELOCITY, vocabulary.EVENT_CLASSES - 1],
        "end": [vocabulary.END],
    }
    piece = np.array([vocabulary.START, *(token for kind in kinds.values() for token in kind)], np.uint16)
    nats = np.array([1, 3, 2, 2, 4, 6, 0, 1, 1.0])
    found = score_kinds([nats], [piece])
    assert tuple(found) == KINDS == tuple(kinds)
    assert [kind["nats_per_token"] for kind in found.values()] == [2, 2, 5, 0.5, 1]
    assert [kind["share"] for kind in found.values()] == [0.2, 0.2, 0.5, 0.05, 0.05]
    assert [kind["tokens"] for kind in found.values()] == [2, 2, 2, 2, 1]
    assert list(score_kinds([nats[:2]], [piece[:3]])) == ["note-on"]


def test_the_report_divides_by_tokens_notes_and_seconds(model):
    performance = make_performance(1, notes=10)
    piece = np.array([vocabulary.START, *codec.encode(performance), vocabulary.END], np.int32)
    found = score(model, [piece, piece], stride=8)
    report = found.report()
    assert report["tokens"] == 2 * (len(piece) - 1)
    assert report["notes"] == 20
    assert report["seconds"] == pytest.approx(2 * performance.duration_s, abs=0.01)
    for unit in ("token", "note", "second"):
        assert report[f"nats_per_{unit}"] * report[f"{unit}s"] == pytest.approx(found.nats)


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(model, pieces):
    uniform = noisy_model(CONFIG)
    uniform.head.kernel[...] = jnp.zeros_like(uniform.head.kernel[...])
    assert uniform.head.bias is not None
    uniform.head.bias[...] = jnp.zeros_like(uniform.head.bias[...])
    assert score(uniform, pieces, stride=8).nats_per_token == pytest.approx(
        np.log(vocabulary.VOCABULARY_SIZE), rel=1e-6
    )


def test_progress_rises_to_one(model, pieces):
    shares = []
    score(model, pieces, stride=3, batch_size=1, on_progress=shares.append)
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
        score(model, pieces, **sizes)


def test_nothing_to_score_is_refused(model):
    with pytest.raises(ValueError, match="no pieces"):
        score(model, [], stride=8)
    with pytest.raises(ValueError, match="a start and an end"):
        score(model, [np.array([vocabulary.START])], stride=8)


KIND_SIZES = (vocabulary.PITCHES, vocabulary.PITCHES, vocabulary.MAX_SHIFT_STEPS, vocabulary.VELOCITY_BINS, 3)


def by_kind(numbers):
    """A number a kind of event as one a token."""
    return np.repeat(np.asarray(numbers), KIND_SIZES)


def saying(logits_V):
    """A model that says the same whatever it reads."""
    model = noisy_model(dataclasses.replace(CONFIG, context=256, latents=256))
    kernel_DxV = jnp.zeros_like(model.head.kernel[...])
    nnx.update(model.head, {"kernel": kernel_DxV, "bias": jnp.asarray(logits_V, jnp.float32)})
    return model


@pytest.fixture(scope="module")
def told():
    """Pieces, and the logits by which each token is exactly as likely as it is frequent in them."""
    random = np.random.default_rng(0)
    counts = np.ceil(30 * np.exp(random.normal(size=vocabulary.VOCABULARY_SIZE))).astype(int)
    counts[[vocabulary.PAD, vocabulary.START]] = 0
    parts = np.array_split(random.permutation(np.repeat(np.arange(vocabulary.VOCABULARY_SIZE), counts)), 3)
    pieces = [np.array([vocabulary.START, *part], np.uint16) for part in parts]
    return pieces, np.where(counts > 0, np.log(np.maximum(counts, 1) / counts.sum()), -30.0)


@pytest.mark.parametrize(
    ("scales", "offsets"),
    [
        ((1, 1, 1, 1, 1), (0, 0, 0, 0, 0)),
        ((1.25, 1.25, 1.25, 1.25, 1.25), (0, 0, 0, 0, 0)),  # one temperature
        ((0.7, 1.5, 1.1, 0.9, 1), (-0.4, 0.8, -0.5, 0.2, 0.1)),  # so far off that whole steps lead up
    ],
)
def test_calibration_finds_the_scale_and_the_offset_of_each_kind(told, scales, offsets):
    pieces, logits_V = told
    better, found = calibrated(saying((logits_V - by_kind(offsets)) / by_kind(scales)), pieces)
    assert tuple(found) == KINDS
    assert better.head.bias is not None
    chances_V = jax.nn.softmax(better.head.bias[...])
    np.testing.assert_allclose(chances_V, np.exp(logits_V), rtol=0.005, atol=1e-7)
    # Offsets count beside each other only, and the one end token's scale and offset do the same.
    np.testing.assert_allclose([found[kind]["scale"] for kind in KINDS[:4]], scales[:4], rtol=0.005)
    found_offsets = np.array([found[kind]["offset"] for kind in KINDS[:4]])
    np.testing.assert_allclose(found_offsets - found_offsets[0], np.subtract(offsets[:4], offsets[0]), atol=0.02)


def test_a_calibrated_model_is_left_alone(told):
    pieces, logits_V = told
    better, found = calibrated(saying(logits_V), pieces)
    assert [fit["scale"] for fit in found.values()] == pytest.approx([1] * 5, abs=1e-3)
    assert [fit["offset"] for fit in found.values()] == pytest.approx([0] * 5, abs=1e-3)
    assert better.head.bias is not None
    np.testing.assert_allclose(jax.nn.softmax(better.head.bias[...]), np.exp(logits_V), rtol=0.001, atol=1e-7)


def test_calibration_is_worth_more_than_any_temperature(model, pieces):
    """Its scales and offsets are in the logits, whatever was read, and nothing else has changed."""
    before = nnx.state(nnx.clone(model))
    better, found = calibrated(model, pieces)
    nats = np.concatenate(
        score_tokens(model, pieces, stride=8, temperatures=np.geomspace(0.5, 50, 30).tolist()), axis=1
    )
    assert score(better, pieces, stride=8).nats < nats.sum(axis=1).min() - 5
    tokens_BxT = jnp.asarray(pieces[-1][None, 3:20], jnp.int32)
    scale_V, offset_V = (by_kind([fit[name] for fit in found.values()]) for name in ("scale", "offset"))
    np.testing.assert_allclose(
        better(tokens_BxT), model(tokens_BxT) * scale_V[None, None] + offset_V[None, None], rtol=1e-4, atol=1e-4
    )
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_nothing_to_calibrate_on_is_refused(model):
    with pytest.raises(ValueError, match="no pieces"):
        calibrated(model, [])


def test_scoring_through_the_decoder(model):
    """Token by token through the caches, for pieces of many lengths at once and a budget that rolls over."""
    budget, encoded = 4, codec.encode(make_performance(3))
    pieces = [np.array([vocabulary.START, *encoded[:length], vocabulary.END], np.uint16) for length in (1, 6, 11)]
    nats = []
    for piece in pieces:  # none is longer than the context, so that the model as trained is the reference
        for target in range(1, len(piece)):
            first_latent = max((target - 1) // (budget // 2) - 1, 0) * (budget // 2)
            logits = reference(model, piece[:target], latents=target - first_latent)[-1]
            nats.append(np.log(np.exp(logits).sum()) - logits[piece[target]])
    found = score_decoding(Decoder(model, int8=False), pieces, latents=budget, mode="exact", batch_size=2)
    assert found.tokens == len(nats)
    assert found.nats == pytest.approx(sum(nats), rel=1e-4)
