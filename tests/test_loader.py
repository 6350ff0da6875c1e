"""What an epoch adds up to, what a window holds, and how a position is restored."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from tiny_maestro import LENGTHS, numbered_pieces, pieces_of, random_pieces

from data_pipeline.augmentation.mode_and_rubato import LABEL_SIZE, PieceAugmentation, augmentation_label
from data_pipeline.augmentation.transforms import Augmentation, shift_velocity, transpose
from data_pipeline.dataset import Pieces
from data_pipeline.loader import LoaderConfig, batches
from data_pipeline.windows import Windows
from music_ar.tokens.vocabulary import END, NOTE_OFF, PAD, START, TIME_SHIFT, VELOCITY

CONTEXT, LATENTS = 24, 8


@pytest.fixture
def numbered():
    return numbered_pieces()


@pytest.fixture(scope="module")
def music():
    return random_pieces()


def make(*parts, batch_size=1, seed=0, **options):
    config = LoaderConfig(context=CONTEXT, latents=LATENTS, batch_size=batch_size, seed=seed, **options)
    return batches(*parts, config=config)


def windows_per_epoch(pieces):
    return len(Windows(pieces=pieces, context=CONTEXT, latents=LATENTS, seed=0, augmentation=None))


def rows(iterator, count):
    """The next `count` windows of batches of any size, as (tokens, weights)."""
    windows = (window for batch in iterator for window in zip(batch["tokens"], batch["weights"], strict=True))
    return list(itertools.islice(windows, count))


def epochs(pieces, count, **options):
    """The first epochs, each a list of windows."""
    size = windows_per_epoch(pieces)
    windows = rows(make(pieces, **options), size * count)
    return [windows[start : start + size] for start in range(0, size * count, size)]


def total_weights(windows):
    totals = {}
    for tokens, weights in windows:
        for target, weight in zip(tokens[-LATENTS:].tolist(), weights.tolist(), strict=True):
            totals[target] = totals.get(target, 0) + weight
    return totals


# --- what an epoch is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_every_target_weighs_exactly_one_an_epoch(numbered, seed):
    assert numbered.targets == sum(LENGTHS) - len(LENGTHS)
    for windows in epochs(numbered, 5, seed=seed):
        totals = total_weights(windows)
        assert totals.pop(PAD, 0) == 0
        for tokens in numbered.tokens:
            # START, the first, is never a target; END, the last, is one.
            assert totals.pop(int(tokens[0]), 0) == 0
            assert [totals.pop(token) for token in tokens[1:].tolist()] == [1.0] * (len(tokens) - 1)
        assert totals == {}


def test_a_window_is_a_block_with_all_the_history_there_is_room_for(numbered):
    for tokens, weights in epochs(numbered, 1)[0]:
        piece = next(piece for piece in numbered.tokens if tokens[-1] in piece)
        stop = int(np.flatnonzero(piece == tokens[-1])[0]) + 1
        expected = piece[max(0, stop - CONTEXT - 1) : stop]
        np.testing.assert_array_equal(tokens[-len(expected) :], expected)
        assert (tokens[: -len(expected)] == PAD).all()
        # No latent is wasted while the piece has targets for all.
        assert (weights > 0).sum() == min(LATENTS, len(piece) - 1)


def test_start_is_the_first_input_and_end_the_last_target_of_a_piece(music):
    windows = epochs(music, 1)[0]
    beginnings = [weights for tokens, weights in windows if START in tokens[-LATENTS - 1 : -1]]
    endings = [weights for tokens, weights in windows if tokens[-1] == END]
    assert len(beginnings) == len(endings) == len(music)
    assert all(weights[0] == 1 for weights in beginnings)
    assert all(weights[-1] == 1 for weights in endings)


def test_epochs_are_cut_and_shuffled_anew(numbered):
    orders = [[int(tokens[-1]) for tokens, _ in windows] for windows in epochs(numbered, 40)]
    # The last piece but one has 59 targets in 8 blocks of 8: the second block ends with target 16, or up to 5 before.
    first, last = numbered.tokens[-2][[0, -1]]
    second_ends = {sorted(end - first for end in ends if first <= end <= last)[1] for ends in orders}
    assert second_ends == {11, 12, 13, 14, 15, 16}
    # Blocks of the shortest pieces never move, so their places depend on the order alone.
    places = {tuple(ends.index(int(tokens[-1])) for tokens in numbered.tokens[:3]) for ends in orders}
    assert len(places) > 30


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_augmented_windows_are_full_and_keep_the_weights_of_their_events(music):
    augmentation = Augmentation()
    several = epochs(music, 4, augmentation=augmentation)
    for tokens, weights in itertools.chain(*several):
        assert ((tokens >= 0) & (tokens <= END)).all()
        # Padding comes only before the START of a piece: there was enough history to stretch.
        padding = int((tokens == PAD).sum())
        assert (tokens[:padding] == PAD).all()
        assert padding == 0 or tokens[padding] == START
        assert (weights[tokens[-LATENTS:] == PAD] == 0).all()
        assert (weights[tokens[-LATENTS:] == START] == 0).all()
    weighed = np.concatenate([weights for _, weights in itertools.chain(*several)]).sum() / len(several)
    assert weighed == pytest.approx(music.targets, rel=0.02)
    for windows in several:
        assert sum(tokens[-1] == END for tokens, _ in windows) == len(music)
        beginnings = [weights for tokens, weights in windows if START in tokens[-LATENTS - 1 : -1]]
        assert len(beginnings) == len(music)


@pytest.fixture
def slow():
    """A piece of silences of 1.5 s: two time shifts, or one to three after a stretch; each note has its own pitch."""
    pitches = range(21, 45)
    silence = [TIME_SHIFT + 99, TIME_SHIFT + 49]
    events = [event for pitch in pitches for event in (pitch, *silence)] + [NOTE_OFF + pitch for pitch in pitches]
    return pieces_of([np.array([START, VELOCITY, *events, END], np.uint16)])


def test_beginnings_are_not_lost_in_slower_music(slow):
    augmentation = Augmentation(min_semitones=0, max_semitones=0, min_stretch=1.0, max_stretch=2.0)
    for windows in epochs(slow, 20, augmentation=augmentation):
        [first] = [tokens for tokens, _ in windows if tokens[-LATENTS - 1] == START]
        np.testing.assert_array_equal(first[-LATENTS : -LATENTS + 3], [VELOCITY, 21, TIME_SHIFT + 99])


def test_weights_follow_their_events_through_the_stretch(slow):

    def targets(windows):
        return [list(zip(tokens[-LATENTS:].tolist(), weights.tolist(), strict=True)) for tokens, weights in windows]

    plain = dict(itertools.chain(*targets(epochs(slow, 1)[0])))
    assert {0.5, 1.0} <= set(plain.values())
    augmentation = Augmentation(min_semitones=0, max_semitones=0, min_stretch=0.5)
    stretched = targets(epochs(slow, 1, augmentation=augmentation)[0])
    assert stretched != targets(epochs(slow, 1)[0])
    for window in stretched:
        assert all(weight == plain.get(token, 0) for token, weight in window if not TIME_SHIFT <= token < VELOCITY)
        for (token, weight), (_, following) in itertools.pairwise(window):
            assert weight == following or not TIME_SHIFT <= token < VELOCITY


def test_a_window_has_one_augmentation_and_another_in_each_epoch(music):
    augmentation = Augmentation(min_stretch=1.0, max_stretch=1.0)
    only_start = pieces_of([music.tokens[0][:8]])
    plain = epochs(only_start, 1)[0][0][0]
    moved = [windows[0][0] for windows in epochs(only_start, 100, augmentation=augmentation)]
    is_note = plain < VELOCITY
    shifts = {tuple(np.unique((tokens - plain)[is_note & (plain < TIME_SHIFT)])) for tokens in moved}
    assert shifts == {(semitones,) for semitones in range(-5, 7)}
    assert all(((tokens == plain) | is_note).all() for tokens in moved)


# --- order, processes, state -----------------------------------------------------------------------------------------


def assert_same(left, right):
    for (left_tokens, left_weights), (right_tokens, right_weights) in zip(left, right, strict=True):
        np.testing.assert_array_equal(left_tokens, right_tokens)
        np.testing.assert_array_equal(left_weights, right_weights)


def test_the_seed_decides_and_not_the_number_of_threads(music):
    first = rows(make(music, batch_size=3, augmentation=Augmentation()), 90)
    assert_same(first, rows(make(music, batch_size=3, augmentation=Augmentation(), threads=0), 90))
    assert_same(first, rows(make(music, batch_size=5, augmentation=Augmentation(), threads=4), 90))
    assert_same(first, rows(make(music, batch_size=3, augmentation=Augmentation(), workers=2), 90))
    other = rows(make(music, batch_size=3, augmentation=Augmentation(), seed=1), 90)
    assert any((left != right).any() for (left, _), (right, _) in zip(first, other, strict=True))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_order(music, processes):
    augmentation = Augmentation()
    alone = rows(make(music, augmentation=augmentation), 120)
    parts = [
        rows(make(music, augmentation=augmentation, batch_size=processes, rows=(index,)), 120 // processes)
        for index in range(processes)
    ]
    assert_same(alone, [window for windows in zip(*parts, strict=True) for window in windows])


def test_processes_see_every_target_once(numbered):
    count = windows_per_epoch(numbered)
    parts = [rows(make(numbered, batch_size=2, rows=(index,)), count) for index in range(2)]
    # Two epochs, half of their windows each.
    totals = total_weights(parts[0] + parts[1])
    assert all(totals[token] == 2.0 for tokens in numbered.tokens for token in tokens[1:].tolist())


@pytest.mark.parametrize("position", [0, 1, 7, 60])
def test_a_restored_position_continues_exactly(music, position):
    iterator = make(music, batch_size=4, augmentation=Augmentation())
    rows(iterator, 4 * position)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 20)
    fresh = make(music, batch_size=4, augmentation=Augmentation())
    rows(fresh, 12)
    fresh.set_state(state)
    assert_same(rows(fresh, 20), expected)


def test_a_position_is_that_of_all_processes_together(music):
    """Saved by one of two, restored by each of three with other rows, in any order."""
    augmentation = Augmentation()
    alone = make(music, batch_size=6, augmentation=augmentation)
    rows(alone, 6 * 5)
    saved = make(music, batch_size=6, augmentation=augmentation, rows=(3, 4, 5))
    rows(saved, 3 * 5)
    assert saved.get_state() == alone.get_state() == {"examples": 30}
    expected = rows(alone, 12)
    for share in ((0, 1), (4, 2), (5, 3)):
        resumed = make(music, batch_size=6, augmentation=augmentation, rows=share)
        resumed.set_state(json.loads(json.dumps(saved.get_state())))
        assert_same(rows(resumed, 4), [expected[6 * batch + row] for batch in range(2) for row in share])


def test_a_position_saved_by_earlier_versions_counts_batches(music):
    iterator = make(music, batch_size=4)
    iterator.set_state({"next_index": 7})
    assert iterator.get_state() == {"examples": 28}


def test_impossible_arguments_are_refused(music):
    defaults: dict[str, Any] = {"context": CONTEXT, "latents": LATENTS, "batch_size": 1, "seed": 0}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"latents": 0}, "1 <= latents <= context, got latents 0"),
        ({"latents": 25}, "got latents 25 and context 24"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"threads": -1}, "threads and workers of at least 0, got -1 and 0"),
        ({"workers": -1}, "threads and workers of at least 0, got 1 and -1"),
        ({"seed": -1}, "seed in .* got -1"),
        ({"batch_size": 2, "rows": (1, 2)}, r"rows in 0\.\.1, at least one, got \[1, 2\]"),
        ({"rows": ()}, r"at least one, got \[\]"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            LoaderConfig(**(defaults | options))
    with pytest.raises(ValueError, match="into 2 equal parts, got 3"):
        make(music, music, batch_size=3)


# --- folds -----------------------------------------------------------------------------------------------------------


def parts_of(iterator, count, parts):
    """The windows of each part in the next `count` batches."""
    taken = list(itertools.islice(iterator, count))
    cut = [[np.split(batch[name], parts) for name in ("tokens", "weights")] for batch in taken]
    return [
        [window for tokens, weights in cut for window in zip(tokens[part], weights[part], strict=True)]
        for part in range(parts)
    ]


def test_share_k_of_a_batch_is_of_fold_k_and_each_fold_has_whole_epochs(numbered):
    folds = numbered.folds(3)
    sizes = [windows_per_epoch(fold) for fold in folds]
    windows = parts_of(make(*folds, batch_size=6), max(sizes), 3)
    for fold, size, part in zip(folds, sizes, windows, strict=True):
        totals = total_weights(part[:size])
        totals.pop(PAD, 0)
        starts = [int(tokens[0]) for tokens in fold.tokens]
        assert [totals.pop(start, 0) for start in starts] == [0] * len(starts)
        assert totals == {int(token): 1.0 for tokens in fold.tokens for token in tokens[1:]}


def test_folds_of_equal_length_come_in_different_orders(numbered):
    twins = [numbered, numbered]
    first, second = parts_of(make(*twins, batch_size=2), 20, 2)
    assert any((left != right).any() for (left, _), (right, _) in zip(first, second, strict=True))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_together_have_the_batch_of_one(music, processes):
    """If a process has several parts, and if a part is shared by several processes."""
    folds = music.folds(3)
    alone = rows(make(*folds, batch_size=12), 60)
    size = 12 // processes
    shares = [tuple(range(index * size, (index + 1) * size)) for index in range(processes)]
    shared = [make(*folds, batch_size=12, rows=share) for share in shares]
    together = [window for _ in range(5) for iterator in shared for window in rows(iterator, size)]
    assert_same(alone, together)


def test_batches_of_folds_continue_exactly_and_with_workers_too(music):
    folds = music.folds(2)
    iterator = make(*folds, batch_size=4, augmentation=Augmentation())
    rows(iterator, 28)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 20)
    fresh = make(*folds, batch_size=4, augmentation=Augmentation())
    fresh.set_state(state)
    assert_same(rows(fresh, 20), expected)
    assert_same(rows(make(*folds, batch_size=4, augmentation=Augmentation(), workers=2), 48)[28:], expected)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_say_how_windows_were_augmented(music):
    """With its augmentation undone, each window is found in the piece it was cut from."""
    augmentation = Augmentation(min_stretch=1.0, max_stretch=1.0, velocity_bins=3)
    copies = music.augmented_copies(0)
    batch = next(make(Pieces.join([music, copies]), augmentation=augmentation, batch_size=64))
    parts = [[tokens.astype(np.int32).tobytes() for tokens in part.tokens] for part in (music, copies)]
    moves = set()
    for tokens, label in zip(batch["tokens"], batch["labels"], strict=True):
        semitones, bins = round(6 * float(label[11])), round(2 * float(label[13]))
        moves.add((semitones, bins))
        window = transpose(shift_velocity(tokens[tokens != PAD], -bins), -semitones)
        is_copy = bool(label[14:].any())
        assert [any(window.tobytes() in piece for piece in part) for part in parts] == [not is_copy, is_copy]
        np.testing.assert_array_equal(label, augmentation_label(semitones, 1.0, bins, piece_augmentation(label)))
    assert len(moves) > 20


def piece_augmentation(label):
    thirds, sixths, contrast, rubato = map(float, label[14:])
    return PieceAugmentation(
        swap_thirds=thirds > 0, swap_sixths=sixths > 0, log_contrast=0.35 * contrast, rubato=0.15 * rubato
    )


def test_the_label_contains_the_stretch(music):
    batch = next(make(music, augmentation=Augmentation(min_semitones=0, max_semitones=0), batch_size=64))
    assert not batch["labels"][:, [*range(12), *range(13, LABEL_SIZE)]].any()
    factors = 1.1 ** batch["labels"][:, 12]
    assert 0.9 <= factors.min() < 0.92
    assert 1.08 < factors.max() <= 1.1
