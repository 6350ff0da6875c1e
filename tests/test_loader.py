"""What an epoch adds up to, what a window holds, how a position is restored, and which folders are refused."""

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from tiny_maestro import archive_files, forget_compositions, random_performance, write_zip

from data_pipeline.augmentation.mode_and_rubato import AS_PLAYED, VIEW_SIZE, Variation, view
from data_pipeline.augmentation.transforms import Augmentation, louden, transpose
from data_pipeline.loader import Pieces, batches, windows_per_epoch
from data_pipeline.maestro import DatasetError
from data_pipeline.prepare import PieceRecord, prepare_maestro
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import END, NOTE_OFF, PAD, START, TIME_SHIFT, VELOCITY

CONTEXT, LATENTS = 24, 8
# Shorter than, as long as, and longer than a block of targets; whole multiples and not; longer than the context.
LENGTHS = (2, 5, 8, 9, 10, 16, 17, 24, 60, 101)


def pieces_of(arrays, compositions=None):
    records = [
        PieceRecord(name=str(number), start=0, tokens=len(tokens) - 2, notes=1, seconds=1.0, composition=composition)
        for number, (tokens, composition) in enumerate(
            zip(arrays, compositions or map(str, range(len(arrays))), strict=True)
        )
    ]
    return Pieces(tokens=tuple(arrays), records=tuple(records), variations=(AS_PLAYED,) * len(records))


@pytest.fixture
def numbered():
    """Pieces whose tokens are all different numbers, so that a window shows where it was cut; no number is PAD."""
    starts = 1000 + np.cumsum((0, *LENGTHS))
    return pieces_of(
        [np.arange(start, start + length, dtype=np.uint16) for start, length in zip(starts[:-1], LENGTHS, strict=True)]
    )


@pytest.fixture(scope="module")
def music():
    """Six pieces of real events."""
    events = [encode(random_performance(seed, notes)) for seed, notes in enumerate((10, 40, 80, 160, 300, 500))]
    return pieces_of([np.array([START, *tokens, END], np.uint16) for tokens in events])


def make(*parts, batch_size=1, seed=0, **options):
    return batches(*parts, context=CONTEXT, latents=LATENTS, batch_size=batch_size, seed=seed, **options)


def rows(iterator, count):
    """The next `count` windows of batches of any size, as (tokens, weights)."""
    windows = (window for batch in iterator for window in zip(batch["tokens"], batch["weights"], strict=True))
    return list(itertools.islice(windows, count))


def epochs(pieces, count, **options):
    """The first epochs, each a list of windows."""
    size = windows_per_epoch(pieces, latents=LATENTS)
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


def test_a_piece_begins_with_start_as_first_input_and_ends_with_end_as_last_target(music):
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
    # Blocks of the shortest pieces never move, so their places tell of the order alone.
    places = {tuple(ends.index(int(tokens[-1])) for tokens in numbered.tokens[:3]) for ends in orders}
    assert len(places) > 30


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_augmented_windows_are_full_of_music_and_weigh_what_their_events_did(music):
    augmentation = Augmentation()
    several = epochs(music, 4, augmentation=augmentation)
    for tokens, weights in itertools.chain(*several):
        assert ((tokens >= 0) & (tokens <= END)).all()
        # Padding is only ever before the START of a piece: there was history enough to stretch.
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


def test_returns_change_nothing_but_inputs_before_the_targets(music):
    plain = Augmentation(min_stretch=1.0, max_stretch=1.0, min_semitones=0, max_semitones=0)
    without = rows(make(music, augmentation=plain), 60)
    found = rows(make(music, augmentation=dataclasses.replace(plain, returns=1.0)), 60)
    changed = 0
    for (tokens, weights), (varied, same_weights) in zip(without, found, strict=True):
        np.testing.assert_array_equal(varied[-LATENTS:], tokens[-LATENTS:])
        np.testing.assert_array_equal(weights, same_weights)
        different = np.flatnonzero(varied != tokens)
        changed += len(different) > 0
        # What is heard before are the notes of the targets, after note-offs of what sounded.
        struck = varied[different][varied[different] < NOTE_OFF]
        assert np.isin(struck, tokens[-LATENTS:]).all()
    assert changed > 10


def test_weights_follow_their_events_through_the_stretch():
    keys = range(21, 45)
    silence = [TIME_SHIFT + 99, TIME_SHIFT + 49]  # one shift or two, by the stretch
    events = [event for key in keys for event in (key, *silence)] + [NOTE_OFF + key for key in keys]
    pieces = pieces_of([np.array([START, VELOCITY, *events, END], np.uint16)])

    def targets(windows):
        return [list(zip(tokens[-LATENTS:].tolist(), weights.tolist(), strict=True)) for tokens, weights in windows]

    plain = dict(itertools.chain(*targets(epochs(pieces, 1)[0])))  # every event has one key of its own
    assert {0.5, 1.0} <= set(plain.values())
    augmentation = Augmentation(min_semitones=0, max_semitones=0, min_stretch=0.5)
    stretched = targets(epochs(pieces, 1, augmentation=augmentation)[0])
    assert stretched != targets(epochs(pieces, 1)[0])
    for window in stretched:
        assert all(weight == plain.get(token, 0) for token, weight in window if not TIME_SHIFT <= token < VELOCITY)
        for (token, weight), (_, following) in itertools.pairwise(window):
            assert weight == following or not TIME_SHIFT <= token < VELOCITY


def test_a_window_has_one_augmentation_and_another_epoch_another(music):
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


def test_the_seed_and_not_the_threads_decide(music):
    first = rows(make(music, batch_size=3, augmentation=Augmentation()), 90)
    assert_same(first, rows(make(music, batch_size=3, augmentation=Augmentation(), threads=0), 90))
    assert_same(first, rows(make(music, batch_size=5, augmentation=Augmentation(), threads=4), 90))
    assert_same(first, rows(make(music, batch_size=3, augmentation=Augmentation(), workers=2), 90))
    other = rows(make(music, batch_size=3, augmentation=Augmentation(), seed=1), 90)
    assert any((left != right).any() for (left, _), (right, _) in zip(first, other, strict=True))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_order_between_them(music, processes):
    augmentation = Augmentation()
    alone = rows(make(music, augmentation=augmentation), 120)
    parts = [
        rows(make(music, augmentation=augmentation, process_index=index, process_count=processes), 120 // processes)
        for index in range(processes)
    ]
    assert_same(alone, [window for windows in zip(*parts, strict=True) for window in windows])


def test_processes_see_every_target_once(numbered):
    count = windows_per_epoch(numbered, latents=LATENTS)
    parts = [rows(make(numbered, process_index=index, process_count=2), count) for index in range(2)]
    # Two epochs, half of their windows each.
    totals = total_weights(parts[0] + parts[1])
    assert all(totals[token] == 2.0 for tokens in numbered.tokens for token in tokens[1:].tolist())


@pytest.mark.parametrize("position", [0, 1, 7, 60])
def test_a_restored_position_goes_on_exactly(music, position):
    iterator = make(music, batch_size=4, augmentation=Augmentation())
    rows(iterator, 4 * position)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 20)
    fresh = make(music, batch_size=4, augmentation=Augmentation())
    rows(fresh, 12)
    fresh.set_state(state)
    assert_same(rows(fresh, 20), expected)


def test_impossible_arguments_are_refused(music):
    defaults: dict[str, Any] = {"context": CONTEXT, "latents": LATENTS, "batch_size": 1, "seed": 0}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"latents": 0}, "1 <= latents <= context, got latents 0"),
        ({"latents": 25}, "got latents 25 and context 24"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seed": -1}, "seed in .* got -1"),
        ({"process_index": 2, "process_count": 2}, "process_index < process_count, got 2 of 2"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            batches(music, **(defaults | options))
    with pytest.raises(ValueError, match=r"in 2 equal parts, got 3 \* 1"):
        make(music, music, batch_size=3)


# --- folds -----------------------------------------------------------------------------------------------------------


def sized(**tokens):
    """A piece of so many tokens for each composition, several where there is a list."""
    each = [(name, size) for name, sizes in tokens.items() for size in np.atleast_1d(sizes)]
    return pieces_of([np.zeros(size + 2, np.uint16) for _, size in each], [name for name, _ in each])


def names(folds):
    return [[record.composition for record in fold.records] for fold in folds]


def test_folds_by_hand():
    pieces = sized(E=1, A=[10, 3], D=5, B=12, C=6)
    # In order of size: A 13 | B 12; C joins B, 18; D joins A, 18; E finds both alike and goes to the first.
    assert names(pieces.folds(2)) == [["E", "A", "A", "D"], ["B", "C"]]
    # A 13 | B 12 | C 6; D joins C, 11, and so does E, 12.
    assert names(pieces.folds(3)) == [["A", "A"], ["B"], ["E", "D", "C"]]
    assert names(pieces.folds(1)) == [["E", "A", "A", "D", "B", "C"]]
    for fold in pieces.folds(3):
        assert [len(tokens) - 2 for tokens in fold.tokens] == [record.tokens for record in fold.records]


def test_of_equal_compositions_the_name_decides():
    assert names(sized(B=4, A=4, C=4).folds(2)) == [["A", "C"], ["B"]]
    assert names(sized(C=4, B=4, A=4).folds(2)) == [["C", "A"], ["B"]]


def test_titles_that_are_only_written_differently_are_one_composition():
    titles = ["Liszt: Après une lecture, S. 161", "Other: Étude", "Liszt: Aprés  une Lecture S.161", "Liszt: S. 162"]
    pieces = pieces_of([np.zeros(8, np.uint16)] * 4, titles)
    assert names(pieces.folds(3)) == [[titles[0], titles[2]], [titles[3]], [titles[1]]]


def test_joined_folds_are_all_pieces_again(numbered):
    folds = numbered.folds(3)
    joined = Pieces.join(folds)
    assert sorted(record.name for record in joined.records) == sorted(record.name for record in numbered.records)
    for tokens, record in zip(joined.tokens, joined.records, strict=True):
        np.testing.assert_array_equal(tokens, numbered.tokens[int(record.name)])
    assert len(Pieces.join(folds[1:])) == len(numbered) - len(folds[0])


@pytest.mark.parametrize("count", [0, 4])
def test_folds_that_cannot_be_cut_are_refused(count):
    with pytest.raises(DatasetError, match=f"at least 1 fold and at most 3, one a composition; got {count}"):
        sized(A=[1, 2], B=3, C=4).folds(count)


def test_data_that_earlier_versions_prepared_serves_but_has_no_folds(folder):
    assert len(Pieces.open(folder, "train").folds(3)) == 3
    forget_compositions(folder)
    pieces = Pieces.open(folder, "train")
    next(make(pieces))
    with pytest.raises(DatasetError, match=r"manifest\.json: .* 2004/aria\.midi is\. Prepare the data again"):
        pieces.folds(3)


def parts_of(iterator, count, parts):
    """Of the next `count` batches, the windows of each part."""
    taken = list(itertools.islice(iterator, count))
    cut = [[np.split(batch[name], parts) for name in ("tokens", "weights")] for batch in taken]
    return [
        [window for tokens, weights in cut for window in zip(tokens[part], weights[part], strict=True)]
        for part in range(parts)
    ]


def test_part_k_of_a_batch_is_of_fold_k_and_each_fold_has_whole_epochs(numbered):
    folds = numbered.folds(3)
    sizes = [windows_per_epoch(fold, latents=LATENTS) for fold in folds]
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
def test_processes_side_by_side_hold_the_batch_of_one(music, processes):
    """Where a process holds several parts, and where a part lies with several processes."""
    folds = music.folds(3)
    alone = rows(make(*folds, batch_size=12), 60)
    size = 12 // processes
    shared = [make(*folds, batch_size=size, process_index=index, process_count=processes) for index in range(processes)]
    together = [window for _ in range(5) for iterator in shared for window in rows(iterator, size)]
    assert_same(alone, together)


def test_batches_of_folds_go_on_exactly_and_in_processes_too(music):
    folds = music.folds(2)
    iterator = make(*folds, batch_size=4, augmentation=Augmentation())
    rows(iterator, 28)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 20)
    fresh = make(*folds, batch_size=4, augmentation=Augmentation())
    fresh.set_state(state)
    assert_same(rows(fresh, 20), expected)
    assert_same(rows(make(*folds, batch_size=4, augmentation=Augmentation(), workers=2), 48)[28:], expected)


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    prepare_maestro(
        write_zip(tmp_path / "maestro.zip", archive_files()), tmp_path / "tokens", workers=1, progress=False
    )
    return tmp_path / "tokens"


def test_pieces_on_disk(folder):
    pieces = Pieces.open(folder, "train")
    assert [record.name for record in pieces.records] == ["2004/aria.midi", "2004/bagatelle.midi", "2006/caprice.midi"]
    for tokens, record in zip(pieces.tokens, pieces.records, strict=True):
        assert len(tokens) == record.tokens + 2
        assert (tokens[0], tokens[-1]) == (START, END)
        assert (tokens[1:-1] < PAD).all()
    window = next(make(pieces, batch_size=2))
    assert window["tokens"].shape == (2, CONTEXT + 1)
    assert window["tokens"].dtype == np.int32
    assert window["weights"].shape == (2, LATENTS)
    assert window["weights"].dtype == np.float32


def shard_of(folder, split):
    return next(folder.glob(f"{split}-*.npy"))


def truncate(folder):
    path = shard_of(folder, "train")
    path.write_bytes(path.read_bytes()[:-10])


def edit(folder):
    path = shard_of(folder, "train")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def remove(folder):
    shard_of(folder, "train").unlink()


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def foreign_vocabulary(folder):
    change_manifest(folder, lambda manifest: manifest.update(fingerprint="0123456789abcdef"))


def no_shards(folder):
    change_manifest(folder, lambda manifest: manifest.update(shards=[]))


def moved_pieces(folder):
    def move(manifest):
        first, second = manifest["shards"][0]["pieces"][:2]
        first["tokens"] += 1
        second["start"] += 1
        second["tokens"] -= 1

    change_manifest(folder, move)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"train-00000-\w+\.npy: expected \d+ bytes, found \d+: truncated"),
        (edit, r"train-00000-\w+\.npy: expected SHA-256 .* found .* edited"),
        (remove, r"train-00000-\w+\.npy: cannot be read \(No such file"),
        (foreign_vocabulary, r"manifest\.json: of the event vocabulary 0123456789ab…, expected"),
        (no_shards, r"manifest\.json: the train split is empty"),
        (moved_pieces, r"train-00000-\w+\.npy: its pieces do not lie where the manifest says"),
    ],
)
def test_damaged_data_is_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        Pieces.open(folder, "train")


def test_only_what_is_opened_is_checked(folder):
    truncate(folder)
    assert len(Pieces.open(folder, "test")) == 1
    with pytest.raises(DatasetError, match="expected a split of train, validation, test; got 'dev'"):
        Pieces.open(folder, "dev")


def test_a_view_tells_what_was_done(music):
    """Undone, each window stands in the piece that it was cut from."""
    augmentation = Augmentation(min_stretch=1.0, max_stretch=1.0, velocity_bins=3)
    pieces = Pieces.join([music, music.varied(0)])
    batch = next(make(pieces, augmentation=augmentation, batch_size=64))
    parts = [[tokens.astype(np.int32).tobytes() for tokens in part.tokens] for part in (music, music.varied(0))]
    moves = set()
    for tokens, told in zip(batch["tokens"], batch["view"], strict=True):
        semitones, louder = round(6 * float(told[11])), round(2 * float(told[13]))
        moves.add((semitones, louder))
        window = transpose(louden(tokens[tokens != PAD], -louder), -semitones)
        is_varied = bool(told[14:].any())
        assert [any(window.tobytes() in piece for piece in part) for part in parts] == [not is_varied, is_varied]
        np.testing.assert_array_equal(told, view(semitones, 1.0, louder, _variation(told)))
    assert len(moves) > 20


def _variation(told):
    thirds, sixths, contrast, rubato = map(float, told[14:])
    return Variation(thirds=thirds > 0, sixths=sixths > 0, log_contrast=0.35 * contrast, rubato=0.15 * rubato)


def test_the_stretch_is_told_too(music):
    batch = next(make(music, augmentation=Augmentation(min_semitones=0, max_semitones=0), batch_size=64))
    assert not batch["view"][:, [*range(12), *range(13, VIEW_SIZE)]].any()
    factors = 1.1 ** batch["view"][:, 12]
    assert 0.9 <= factors.min() < 0.92
    assert 1.08 < factors.max() <= 1.1


def test_variations_are_of_the_same_compositions_and_drawn_by_seed(music):
    one, again, other = (music.varied(seed) for seed in (1, 1, 2))
    assert one.records == music.records
    assert one.variations == again.variations != other.variations
    assert all(map(np.array_equal, one.tokens, again.tokens))
    halves = Pieces.join([music, one]).folds(2)
    for half in halves:
        names = [record.name for record in half.records]
        assert sorted(names) == sorted(2 * list(set(names)))  # a piece and its variation are in one fold
        assert half.variations.count(AS_PLAYED) == len(half) / 2
