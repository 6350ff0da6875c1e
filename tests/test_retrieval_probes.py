"""Copying probes: repeats found by brute force, motifs that a model can and cannot attend to."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import make_performance, noisy_model

from music_ar.evaluation.retrieval_probes import (
    MATCH_PITCHES,
    find_repeats,
    natural_copying,
    plant_motifs,
    planted_copying,
)
from music_ar.model.config import PRESETS
from music_ar.tokens import codec, vocabulary


def random_piece(seed, notes=120, pitches=3):
    """Note-ons and note-offs of few pitches, so that contexts repeat."""
    random = np.random.default_rng(seed)
    pitch = random.integers(60, 60 + pitches, notes)
    on_off = np.stack([vocabulary.NOTE_ON + pitch, vocabulary.NOTE_OFF + pitch], axis=1).ravel()
    tokens = np.concatenate([on_off, np.full(30, vocabulary.TIME_SHIFT)])
    return np.array(
        [vocabulary.START, vocabulary.VELOCITY, *tokens[random.permutation(len(tokens))], vocabulary.END], np.uint16
    )


@pytest.fixture(scope="module")
def pieces():
    return [np.array([vocabulary.START, *codec.encode(make_performance(seed)), vocabulary.END]) for seed in range(4)]


@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_the_nearest_earlier_ones(seed):
    piece = random_piece(seed)
    found = find_repeats(piece)
    token = [at for at in range(len(piece)) if piece[at] < vocabulary.NOTE_OFF]
    pitch = [int(piece[at]) for at in token]
    assert found.token.tolist() == token
    for note in range(len(token)):
        context = pitch[note - MATCH_PITCHES : note] if note >= MATCH_PITCHES else None
        earlier = [at for at in range(MATCH_PITCHES, note) if context == pitch[at - MATCH_PITCHES : at]]
        assert found.distance[note] == (token[note] - token[earlier[-1]] if earlier else 0)
        assert found.copies[note] == bool(earlier and pitch[earlier[-1]] == pitch[note])
    assert 0 < (found.distance > 0).sum() < len(token)


def test_natural_copying_counts_every_note_once_by_its_distance():
    pieces = [random_piece(seed, notes=400) for seed in range(3)]
    nll = {50: [np.full(len(piece) - 1, 3.0) for piece in pieces], 200: [np.full(len(p) - 1, 3.0) for p in pieces]}
    far = 0
    for piece, shorter, longer in zip(pieces, nll[50], nll[200], strict=True):
        found = find_repeats(piece)
        only_longer = found.token[(found.distance > 50) & (found.distance <= 200)] - 1  # what token t costs is at t - 1
        longer[only_longer] -= 2.0
        shorter[found.token[found.distance > 200] - 1] = 7.0
        far += len(only_longer)
    rows = {(row.above, row.up_to): row for row in natural_copying(pieces, nll)}
    assert list(rows) == [(None, None), (0, 50), (50, 200), (200, None)]
    assert rows[50, 200].notes == far > 0
    assert rows[50, 200].gain(50, 200) == pytest.approx(2.0)
    assert rows[0, 50].gain(50, 200) == pytest.approx(0.0)
    assert rows[200, None].note_nll[50] == pytest.approx(7.0)
    assert sum(row.notes for row in rows.values()) == sum((piece < vocabulary.NOTE_OFF).sum() for piece in pieces)
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)


def test_a_distance_that_no_note_has_costs_nothing():
    piece = random_piece(0, notes=4)
    rows = natural_copying([piece], {8: [np.zeros(len(piece) - 1)]})
    assert [row.notes for row in rows] == [4, 0, 0]
    assert rows[1].note_nll == {8: None}
    assert rows[1].gain(8, 8) is None


def test_a_planted_motif_occurs_once_or_twice(pieces):
    for planted in plant_motifs(pieces, distance=300, motif_tokens=40, count=5):
        motif = planted.repeated[-planted.targets :].tolist()
        repeated, new = planted.repeated[1:].tolist(), planted.new[1:].tolist()
        assert repeated[: len(motif)] == motif
        same = len(motif) + 200  # the last occurrence and the music before it, except where the longer one is cut
        assert repeated[-same:] == new[-same:]
        assert new[: len(motif)] != motif
        assert abs(len(repeated) - 2 * len(motif) - 300) < 60
        for tokens in (planted.repeated, planted.new):
            assert tokens[0] == vocabulary.START
            assert codec.decode_report(tokens)[1] == (0, 0, 0)  # no cut leaves half a note


def test_distances_share_their_motifs(pieces):
    near, far = (list(plant_motifs(pieces, distance=distance, motif_tokens=40, count=3)) for distance in (100, 300))
    for one, other in zip(near, far, strict=True):
        assert one.repeated[-one.targets :].tolist() == other.repeated[-other.targets :].tolist()


@pytest.mark.parametrize(
    ("distance", "motif", "message"), [(10_000, 40, "outside the motif"), (100, 5000, "10000 tokens")]
)
def test_too_little_music_is_refused(pieces, distance, motif, message):
    with pytest.raises(ValueError, match=message):
        list(plant_motifs(pieces, distance=distance, motif_tokens=motif, count=1))


def test_an_earlier_occurrence_matters_only_within_the_context(pieces):
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], layers=1))
    sizes: dict[str, Any] = {"latents": 64, "motif_tokens": 24, "count": 3, "batch_size": 4}
    within = planted_copying(model, pieces, distance=100, context=256, **sizes)
    beyond = planted_copying(model, pieces, distance=300, context=256, **sizes)
    assert (within.distance, within.motifs) == (100, 3)
    assert within.repeated != pytest.approx(within.new, abs=1e-4)
    assert within.gain == within.new - within.repeated
    assert beyond.repeated == pytest.approx(beyond.new, abs=1e-5)
