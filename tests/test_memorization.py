"""Longest shared runs: planted ones of known length, and random music against brute force."""

import numpy as np
import pytest

from music_ar.metrics.memorization import SharedRun, longest_shared_runs, melody, repeats_pattern
from music_ar.midi import Performance


def play(pitches, spacing_s=0.2):
    onset_s = np.arange(len(pitches)) * spacing_s
    return Performance(
        onset_s=onset_s, offset_s=onset_s + 0.1, pitch=np.array(pitches, int), velocity=np.full(len(pitches), 64)
    )


def random_pitches(seed, notes, low=30, high=90):
    return np.random.default_rng(seed).integers(low, high, notes)


def brute_force(piece, corpus):
    """Notes of the longest run of intervals that a piece shares with the corpus."""

    def runs(pitches, length):
        return {tuple(np.diff(pitches[at : at + length])) for at in range(len(pitches) - length + 1)}

    longest = 0
    for length in range(2, len(piece) + 1):
        if any(runs(piece, length) & runs(other, length) for other in corpus):
            longest = length
    return longest


@pytest.mark.parametrize("semitones", [0, 5, -7])
def test_a_planted_run_is_found_in_any_key(semitones):
    source = random_pitches(0, 200)
    copied = [*random_pitches(1, 30), *(source[60:77] + semitones), *random_pitches(2, 30)]
    corpus = [play(random_pitches(3, 100)), play(source)]
    (run,) = longest_shared_runs([play(copied, spacing_s=0.31)], corpus)
    assert run == SharedRun(notes=17, start=30, source=1, source_start=60, end=46, source_end=76)


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed):
    pieces = [random_pitches(seed, notes, 60, 63) for notes in (1, 2, 9, 30)]
    corpus = [random_pitches(seed + 100, notes, 60, 63) for notes in (5, 0, 40, 12)]
    runs = longest_shared_runs([play(each) for each in pieces], [play(each) for each in corpus])
    assert [run.notes for run in runs] == [brute_force(each, corpus) for each in pieces]
    for run, piece in zip(runs, pieces, strict=True):
        ours = piece[run.start : run.start + run.notes]
        theirs = corpus[run.source][run.source_start : run.source_start + run.notes]
        np.testing.assert_array_equal(np.diff(ours), np.diff(theirs))


def test_a_run_does_not_span_two_pieces():
    first, second = random_pitches(0, 20), random_pitches(1, 20)
    (run,) = longest_shared_runs([play([*first, *second])], [play(first), play(second)])
    assert run.notes == 20


def test_a_whole_piece_no_notes_and_no_corpus():
    pitches = random_pitches(0, 50)
    runs = longest_shared_runs([play(pitches), play([]), play([60])], [play(pitches)])
    assert [run.notes for run in runs] == [50, 0, 0]
    assert longest_shared_runs([play(pitches)], []) == [SharedRun()]


def test_the_order_within_a_chord_does_not_matter():
    onset_s = np.array([0.0, 0.02, 0.04, 0.5, 0.6])
    pitch = np.array([67, 60, 64, 72, 71])
    rolled = Performance(onset_s=onset_s, offset_s=onset_s + 1, pitch=pitch, velocity=np.full(5, 64))
    assert melody(rolled).tolist() == [60, 64, 67, 72, 71]


@pytest.mark.parametrize(
    ("intervals", "left"),
    [
        ([2, -2] * 10, [2, -2, 2, -2, 2]),  # a trill
        ([0] * 9, [0] * 4),  # a repeated note
        ([4, 3, 5, -12] * 4, [4, 3, 5, -12, 4, 3, 5]),  # an arpeggio
        ([2, 2, 1, 2, 2, 2, 1] * 3, [2, 2, 1, 2, 2, 2, 1, 1, 2]),  # a scale; 2, 2, 1, 2 repeats sooner
        ([1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, [1, 2, 3, 4, 5, 6, 7, 8, 9] * 2),  # too long for a pattern
        ([1], [1]),
        ([], []),
    ],
)
def test_repeated_patterns_are_marked(intervals, left):
    intervals = np.array(intervals, int)
    assert intervals[~repeats_pattern(intervals)].tolist() == left


def test_without_repeated_patterns_the_length_of_a_trill_makes_no_difference():
    theme = random_pitches(0, 20)
    source = [*theme, *[70, 72] * 20, *random_pitches(1, 30)]
    copied = [*random_pitches(2, 10), *theme, *[70, 72] * 5, *random_pitches(3, 10)]
    corpus = [play([60, 62] * 50), play(source)]
    (whole,) = longest_shared_runs([play(copied)], corpus)
    assert whole == SharedRun(notes=30, start=10, source=1, source_start=0, end=39, source_end=29)
    (without,) = longest_shared_runs([play(copied)], corpus, repeated_patterns=False)
    assert without == SharedRun(notes=26, start=10, source=1, source_start=0, end=35, source_end=25)
    (trill,) = longest_shared_runs([play([50, 52] * 30)], corpus, repeated_patterns=False)
    assert trill.notes == 6
