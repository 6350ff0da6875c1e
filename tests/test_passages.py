"""Passages: what their views hold, which pieces they come from, and how a position is restored."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_maestro import pieces_of, random_performance, random_pieces

from data_pipeline.augmentation.note_tables import transform_notes
from data_pipeline.augmentation.transforms import Augmentation, shift_velocity, stretch, transpose
from data_pipeline.manifest import DatasetError
from data_pipeline.passage_loader import passage_batches
from data_pipeline.passages import AUGMENTATION, PassageConfig, Passages
from music_ar.embedding.notes import DURATION, ONSET, PITCH, VELOCITY, notes_of_tokens
from music_ar.tokens.codec import encode

NEUTRAL = Augmentation(min_semitones=0, max_semitones=0, min_stretch=1.0, max_stretch=1.0, velocity_bins=0)
CONFIG = PassageConfig(passages=2, notes=32, min_passage=2.0, max_passage=4.0, hidden=0.25)


@pytest.fixture(scope="module")
def music():
    """Pieces of 10 (too few) to 500 notes; the last two are performances of one composition."""
    pieces = random_pieces()
    names = ("a", "b", "c", None, "d", "d")
    records = [
        dataclasses.replace(record, composition=name) for record, name in zip(pieces.records, names, strict=True)
    ]
    return dataclasses.replace(pieces, records=tuple(records))


@pytest.fixture(scope="module")
def passages(music):
    return Passages.of(music, config=CONFIG, augmentation=AUGMENTATION, seed=0)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(-12, 12), st.floats(0.5, 2.0), st.integers(-8, 8))
def test_notes_are_transformed_as_their_tokens_are(seed, semitones, factor, bins):
    """No pitch sounds twice at once, see `test_embedding`, and none is outside of the piano."""
    rng = np.random.default_rng(seed)
    performance = dataclasses.replace(random_performance(seed, 60), pitch=30 + rng.permutation(60))
    tokens = encode(performance)
    moved, _ = stretch(shift_velocity(transpose(tokens, semitones), bins), factor)
    found = transform_notes(notes_of_tokens(tokens), semitones, factor, bins)
    np.testing.assert_array_equal(found, notes_of_tokens(moved))


def test_a_note_outside_of_the_piano_is_not_forced_back():
    notes = np.array([[0, 10, 5, 9], [10, 60, 32, 9]], np.int32)
    assert transform_notes(notes, -3, 1.0, 4).tolist() == notes.tolist()
    assert transform_notes(notes, 2, 1.0, -2)[:, [PITCH, VELOCITY]].tolist() == [[12, 3], [62, 30]]


def rows_of(table, count):
    return [tuple(row) for row in table[:count].tolist()]


def test_the_views_of_a_passage_are_overlapping_excerpts(music):
    """Without augmentation: all notes of an excerpt are there, hidden or not, timed from its first, cut at its end."""
    plain = Passages.of(music, config=CONFIG, augmentation=NEUTRAL, seed=0)
    hidden_shares = []
    for index in range(2 * len(plain)):
        example = plain[index]
        for passage in range(CONFIG.passages):
            piece, start, end = (int(example[name][passage]) for name in ("piece", "start", "end"))
            notes = plain.notes[piece]
            spans = []
            for view in range(2):
                visible = rows_of(example["notes"][passage, view], example["counts"][passage, view])
                hidden = rows_of(example["hidden"][passage, view], example["hidden_counts"][passage, view])
                hidden_shares.append(len(hidden) / (len(hidden) + len(visible)))
                found = np.array(sorted(visible + hidden))
                first = next(
                    place
                    for place in range(len(notes) - len(found) + 1)
                    if (notes[place : place + len(found), PITCH] == found[:, PITCH]).all()
                    and (np.diff(notes[place : place + len(found), ONSET]) == np.diff(found[:, ONSET])).all()
                )
                own = notes[first : first + len(found)]
                assert (found[:, VELOCITY] == own[:, VELOCITY]).all()
                assert (found[:, DURATION] <= own[:, DURATION]).all()
                spans.append((int(own[0, ONSET]), int(own[-1, ONSET])))
                assert start <= spans[-1][0] <= spans[-1][1] < end
            assert min(last for _, last in spans) > max(first for first, _ in spans)
    assert np.mean(hidden_shares) == pytest.approx(CONFIG.hidden, abs=0.03)


def test_the_two_views_differ_in_key_tempo_and_loudness(passages):
    example = passages[3]
    first, second = example["notes"][0]
    assert set(first[:8, PITCH].tolist()) != set(second[:8, PITCH].tolist())
    assert (first != second).any()


def test_pieces_with_too_few_notes_are_left_out_and_performances_of_one_composition_share_its_number(music, passages):
    assert [len(notes) for notes in passages.notes] == [40, 80, 160, 300, 500]
    assert list(passages.compositions) == [0, 1, 2, 3, 3]
    with pytest.raises(DatasetError, match="pieces of at least 16 notes to take passages from, got none"):
        Passages.of(pieces_of(music.tokens[:1]), config=CONFIG, augmentation=NEUTRAL, seed=0)


def test_an_epoch_has_every_piece_and_long_ones_more_often():
    long = pieces_of([encode(random_performance(seed, notes)) for seed, notes in enumerate((100, 4000))])
    passages = Passages.of(long, config=CONFIG, augmentation=NEUTRAL, seed=0)
    drawn = [int(passages[index]["piece"][0]) for index in range(len(passages))]
    assert np.bincount(drawn).tolist() == [1, 5]  # of 15 s and of ten minutes


def same(one, other):
    return all((one[name] == other[name]).all() for name in one)


def test_batches_come_again_from_a_saved_position_and_in_parts(passages):
    batches = passage_batches(passages, 4)
    read = [next(batches) for _ in range(4)]
    again = passage_batches(passages, 4, threads=0)
    again.set_state(json.loads(json.dumps({"examples": 8})))
    assert same(next(again), read[2])
    assert same(next(again), read[3])
    assert not same(read[2], read[3])
    part = next(passage_batches(passages, 4, rows=(1, 3), threads=0))
    assert same(part, {name: array[[1, 3]] for name, array in read[0].items()})
    assert not same(next(passage_batches(dataclasses.replace(passages, seed=1), 4)), read[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0.0}, "hidden must be a number above 0 and at most 0.9, got 0"),
        ({"notes": 8}, "notes must be a whole number from 16 to"),
        ({"min_passage": 5.0}, r"max_passage must be at least min_passage = 5\.0, got 4\.0"),
    ],
)
def test_impossible_passages_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)
