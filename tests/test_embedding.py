"""Notes, their features, embeddings of pieces, and the files of an encoder."""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import make_performance, with_noise
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from music_ar.embedding import (
    PRESETS,
    EmbeddingError,
    PieceEmbedder,
    PieceEncoder,
    load_encoder,
    notes_of,
    save_encoder,
)
from music_ar.embedding.note_features import channels, note_features, places
from music_ar.embedding.notes import MAX_NOTES, duration_classes, notes_of_tokens
from music_ar.midi.performance import Performance
from music_ar.model.pretrained import load_pretrained, parameters
from music_ar.model.weights import CheckpointError
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import PITCHES


@pytest.fixture(scope="module")
def embedder(tiny_encoder):
    return PieceEmbedder.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def pieces():
    """Pieces of 20 to 300 notes: of three padded lengths."""
    return [make_performance(seed, notes) for seed, notes in enumerate((20, 128, 129, 300, 256))]


# --- notes -----------------------------------------------------------------------------------------------------------


def test_notes_by_hand():
    piece = Performance(
        onset_s=np.array([0.5, 0.0, 0.504]),
        offset_s=np.array([0.501, 1.0, 2.0]),
        pitch=np.array([64, 60, 62]),
        velocity=np.array([1, 127, 5]),
    )
    assert notes_of(piece).tolist() == [[0, 60, 32, 100], [50, 62, 2, 150], [50, 64, 1, 1]]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 80))
def test_tokens_have_the_notes_of_the_performance(seed, count):
    """No pitch sounds twice at once: tokens do not say which of two notes a note-off ends."""
    rng = np.random.default_rng(seed)
    onset_s = np.cumsum(rng.exponential(0.1, count))
    piece = Performance(
        onset_s=onset_s,
        offset_s=onset_s + rng.uniform(0.001, 3, count),
        pitch=rng.permutation(PITCHES)[:count],
        velocity=rng.integers(1, 128, count),
    )
    np.testing.assert_array_equal(notes_of_tokens(encode(piece)), notes_of(piece))


def test_durations_have_three_classes_for_each_doubling():
    steps = np.array([1, 2, 3, 4, 8, 1023, 1024, 1290, 1291, 10**6], np.int32)
    expected = [0, 3, 4, 6, 9, 29, 30, 30, 31, 31]
    assert duration_classes(steps).tolist() == expected
    assert duration_classes(jnp.asarray(steps)).tolist() == expected


def many_notes(count):
    onset_s, number = np.arange(count) / 10, np.full(count, 60)
    return Performance(onset_s=onset_s, offset_s=onset_s + 1, pitch=number, velocity=number)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Performance.empty(), "the piece has no notes, so nothing can be said about it"),
        (many_notes(MAX_NOTES + 1), "the piece has 65,537 notes, and at most 65,536 can be read at once"),
        (many_notes(1).shift(2e7), "the piece lasts 5,556 hours, and at most 746 can be read"),
    ],
    ids=["empty", "too many notes", "too long"],
)
def test_pieces_without_an_embedding_are_refused(embedder, piece, message):
    with pytest.raises(EmbeddingError, match=f"^{message}"):
        embedder.embed([piece])
    with pytest.raises(EmbeddingError, match=f"^piece 2 of 2: {message}"):
        embedder.embed([many_notes(1), piece])


# --- features --------------------------------------------------------------------------------------------------------

EARLIER, BANDS = 3, 4
INTERVALS = slice(PITCHES, PITCHES + 49 * EARLIER)
RATIOS = slice(INTERVALS.stop, INTERVALS.stop + 7 * (EARLIER + 1))
WHOLE = slice(RATIOS.stop, RATIOS.stop + 4)


def features_of(table, room=0):
    padded = np.concatenate([table, np.full((room, 4), -7)]).astype(np.int32)
    mask = np.arange(len(padded)) < len(table)
    features = note_features(jnp.asarray(padded[None]), jnp.asarray(mask[None]), EARLIER, BANDS)
    return np.asarray(features)[0]


@pytest.fixture(scope="module")
def table():
    """Notes far apart, so that rounding and the least time play no part."""
    rng = np.random.default_rng(0)
    onset = np.cumsum(rng.integers(10**4, 10**5, 30))
    return np.stack([onset, rng.integers(40, 80, 30), rng.integers(1, 33, 30), rng.integers(10**4, 10**5, 30)], axis=1)


def test_features_by_hand():
    """The intervals of three notes, C E G, to the notes before them."""
    features = features_of(np.array([[0, 60, 16, 10], [100, 64, 16, 10], [200, 67, 16, 10]]))
    assert features.shape == (3, channels(EARLIER, BANDS))
    assert features[:, :PITCHES].argmax(axis=1).tolist() == [60, 64, 67]
    hot = features[:, INTERVALS].reshape(3, EARLIER, 49)
    found = [[int(row.argmax()) - 24 if row.any() else None for row in note] for note in hot]
    assert found == [[None, None, None], [4, None, None], [3, 7, None]]


def test_transposed_notes_differ_in_their_pitches_only(table):
    higher = features_of(table + np.array([0, 5, 0, 0]))
    features = features_of(table)
    np.testing.assert_array_equal(higher[:, PITCHES:], features[:, PITCHES:])
    np.testing.assert_array_equal(higher[:, 5:PITCHES], features[:, : PITCHES - 5])


def test_slower_notes_differ_in_tempo_and_length_only(table):
    features, slower = features_of(table), features_of(table * [2, 1, 1, 2])
    changed = np.abs(slower - features).max(axis=0) > 1e-2
    assert np.flatnonzero(changed).tolist() == [WHOLE.start, WHOLE.start + 1]


def test_places_by_hand():
    """A little over a third of a piece, in waves of two pieces, one piece and half of one; and as far before it."""
    onset, start, span = jnp.array([[1037, 963]]), jnp.array([1000]), jnp.array([98])
    angles = 2 * np.pi * np.array([37 / 196, 37 / 98, 37 / 49])
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    found = np.asarray(places(onset, start, span, 3))[0]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], expected * [-1, -1, -1, 1, 1, 1], atol=1e-5)


def test_short_waves_do_not_show_the_rounding_of_times():
    """The place of a note in a piece of three hours, in the shortest wave of 20, against whole numbers of Python."""
    onset, span = 987_653, 1_080_001
    angle = 2 * np.pi * (onset * 2**19 % (2 * span)) / (2 * span)
    found = np.asarray(places(jnp.array([[onset]]), jnp.array([0]), jnp.array([span]), 20))[0, 0]
    np.testing.assert_allclose(found[[19, 39]], [np.sin(angle), np.cos(angle)], atol=1e-5)


def test_padding_changes_no_feature(table):
    np.testing.assert_allclose(features_of(table, room=9)[:30], features_of(table), rtol=1e-5, atol=1e-6)
    assert np.isfinite(features_of(table, room=9)).all()


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_have_unit_length_and_come_again(embedder, pieces):
    found = embedder.embed(pieces)
    assert (found.shape, found.dtype) == ((5, embedder.size), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(embedder.embed(pieces), found)
    assert np.abs(found[:, None] - found[None]).max(axis=2)[~np.eye(5, dtype=bool)].min() > 1e-3


def test_embeddings_do_not_depend_on_the_other_pieces(embedder, pieces):
    """140 short pieces fill a batch and leave some over."""
    short = [make_performance(seed, 10 + seed % 40) for seed in range(140)]
    together = embedder.embed([*pieces, *short])
    np.testing.assert_allclose(embedder.embed(pieces[::-1])[::-1], together[:5], atol=1e-5)
    alone = np.concatenate([embedder.embed([short[number]]) for number in (0, 127, 128, 139)])
    np.testing.assert_allclose(alone, together[[5, 132, 133, 144]], atol=1e-5)
    assert np.abs(alone - np.roll(alone, 1, axis=0)).max(axis=1).min() > 1e-3


def test_no_pieces_have_no_embeddings(embedder):
    assert embedder.embed([]).shape == (0, embedder.size)


def test_padding_changes_no_embedding(tiny_encoder):
    encoder, _ = load_encoder(tiny_encoder)
    notes, count = jnp.asarray(notes_of(make_performance(0, 50))), jnp.array([50])
    longer = jnp.pad(notes, ((0, 30), (0, 0)), constant_values=3)
    embed = jax.jit(lambda table: encoder.embed(encoder.read(table[None], count)))
    found = [embed(table) for table in (notes, longer)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_hidden_notes_are_predicted_by_their_times(tiny_encoder):
    """The logits of one time do not depend on the other times, and are those of the classes of each attribute."""
    encoder, _ = load_encoder(tiny_encoder)
    notes, count = jnp.asarray(notes_of(make_performance(0, 50)))[None], jnp.array([50])
    predict = jax.jit(lambda times: encoder.predict(encoder.read(notes, count), times, notes, count))
    both, alone = predict(jnp.array([[100, 300]])), predict(jnp.array([[300]]))
    assert {name: logits.shape for name, logits in both.items()} == {
        "pitch": (1, 2, 128),
        "velocity": (1, 2, 32),
        "duration": (1, 2, 32),
    }
    for name, logits in both.items():
        np.testing.assert_allclose(logits[:, 1:], alone[name], atol=5e-3)
        assert np.abs(logits[:, 0] - logits[:, 1]).max() > 1e-2


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_encoder, tmp_path):
    """A saved encoder, to damage."""
    return shutil.copytree(tiny_encoder, tmp_path / "saved")


def edit_config(folder, edit):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_config(folder, lambda record: record.update(weights_sha256=digest))


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load_encoder(folder)
    return str(caught.value)


def test_an_encoder_comes_back_in_half_precision(tmp_path):
    encoder = with_noise(PieceEncoder(PRESETS["tiny"], rngs=nnx.Rngs(3)))
    save_encoder(encoder, tmp_path)
    loaded, digest = load_encoder(tmp_path)
    assert loaded.config == encoder.config
    before, after = parameters(encoder), parameters(loaded)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array.astype(np.float16))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 2 * sum(array.size for array in before.values()) + 10_000
    assert PieceEmbedder(loaded).digest == PieceEmbedder.from_pretrained(tmp_path).digest == digest


def test_a_damaged_file_is_refused_by_name(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "model.safetensors does not match its SHA-256" in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("embedding_query"),
            "expected embedding_query as float16 [28] by config.json, found nothing",
        ),
        (
            lambda tensors: tensors.update(extra=np.zeros(1, np.float16)),
            "tensors that do not belong to config.json: ['extra']",
        ),
        (lambda tensors: tensors.update(embedding_query=np.zeros(28, np.float32)), "found float32 [28]"),
        (lambda tensors: tensors.update(embedding_query=np.full(28, np.inf, np.float16)), "infinite or not a number"),
    ],
)
def test_other_weights_are_refused_by_name(folder, edit, message):
    edit_weights(folder, edit)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record.update(format="other"), 'the format is "other"; expected a piece encoder'),
        (
            lambda record: record.update(fingerprint="0" * 64),
            "trained on notes in other steps (fingerprint 000000000000…",
        ),
        (lambda record: record["encoder"].pop("reads"), "lacks reads, so it is not a piece encoder"),
        (lambda record: record["encoder"].update(reads=0), "reads must be a whole number from 1 to 100, got 0"),
        (lambda record: record["encoder"].update(unknown=1), "is not the configuration of a piece encoder"),
        (lambda record: record.update(weights_sha256=None), "lacks the SHA-256 of the weights"),
        (lambda record: record.pop("format"), "lacks format, so it is not a piece encoder"),
    ],
)
def test_other_configurations_are_refused_by_name(folder, edit, message):
    edit_config(folder, edit)
    assert message in refusal(folder)
    assert "config.json" in refusal(folder)


def test_encoders_and_models_that_make_music_are_told_apart(tiny_encoder, tiny_checkpoint):
    assert f"{tiny_checkpoint / 'config.json'}: this is a model that makes music" in refusal(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.json: this is a piece encoder, which compares music"):
        load_pretrained(tiny_encoder)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 3 and 2"):
        dataclasses.replace(PRESETS["tiny"], heads=3, kv_heads=2)
