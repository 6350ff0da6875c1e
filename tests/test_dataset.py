"""The pieces of a prepared split: which folders are refused, how folds are cut, what augmented copies share."""

import hashlib
import json

import numpy as np
import pytest
from tiny_maestro import archive_files, forget_compositions, numbered_pieces, pieces_of, random_pieces, write_zip

from data_pipeline.augmentation.mode_and_rubato import ORIGINAL
from data_pipeline.dataset import Pieces
from data_pipeline.manifest import DatasetError
from data_pipeline.prepare import prepare_maestro
from music_ar.tokens.vocabulary import END, PAD, START

# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    prepare_maestro(write_zip(tmp_path / "maestro.zip", archive_files()), tmp_path / "tokens", workers=1)
    return tmp_path / "tokens"


def test_pieces_on_disk(folder):
    pieces = Pieces.open(folder, "train")
    assert [record.name for record in pieces.records] == ["2004/aria.midi", "2004/bagatelle.midi", "2006/caprice.midi"]
    for tokens, record in zip(pieces.tokens, pieces.records, strict=True):
        assert len(tokens) == record.tokens + 2
        assert (tokens[0], tokens[-1]) == (START, END)
        assert (tokens[1:-1] < PAD).all()


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


def no_events(token):
    """A shard with another token in its first piece, and a manifest that agrees with it."""

    def damage(folder):
        path = shard_of(folder, "train")
        tokens = np.load(path)
        tokens[3] = token
        np.save(path, tokens)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        change_manifest(folder, lambda manifest: manifest["shards"][0].update(sha256=digest))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"train-00000-\w+\.npy: expected \d+ bytes, found \d+: truncated"),
        (edit, r"train-00000-\w+\.npy: expected SHA-256 .* found .* edited"),
        (remove, r"train-00000-\w+\.npy: cannot be read \(No such file"),
        (foreign_vocabulary, r"manifest\.json: expected the event vocabulary .* found 0123456789ab…"),
        (no_shards, r"manifest\.json: the train split is empty"),
        (moved_pieces, r"train-00000-\w+\.npy: its pieces are not where the manifest says"),
        (no_events(PAD), r"train-00000-\w+\.npy: it has tokens that are no events"),
        (no_events(END), r"train-00000-\w+\.npy: it has tokens that are no events"),
        (no_events(60_000), r"train-00000-\w+\.npy: it has tokens that are no events"),
    ],
)
def test_damaged_data_is_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        Pieces.open(folder, "train")


def test_only_the_opened_split_is_checked(folder):
    truncate(folder)
    assert len(Pieces.open(folder, "test")) == 1
    with pytest.raises(DatasetError, match="expected one of the splits train, validation, test; got 'dev'"):
        Pieces.open(folder, "dev")


# --- folds -----------------------------------------------------------------------------------------------------------


def sized(**tokens):
    """For each composition, a piece of this many tokens, or several pieces if it is a list."""
    each = [(name, size) for name, sizes in tokens.items() for size in np.atleast_1d(sizes)]
    return pieces_of([np.zeros(size + 2, np.uint16) for _, size in each], [name for name, _ in each])


def names(folds):
    return [[record.composition for record in fold.records] for fold in folds]


def test_folds_by_hand():
    pieces = sized(E=1, A=[10, 3], D=5, B=12, C=6)
    # In order of size: A 13 | B 12; C joins B, 18; D joins A, 18; for E both are equal, and it joins the first.
    assert names(pieces.folds(2)) == [["E", "A", "A", "D"], ["B", "C"]]
    # A 13 | B 12 | C 6; D joins C, 11, and so does E, 12.
    assert names(pieces.folds(3)) == [["A", "A"], ["B"], ["E", "D", "C"]]
    assert names(pieces.folds(1)) == [["E", "A", "A", "D", "B", "C"]]
    for fold in pieces.folds(3):
        assert [len(tokens) - 2 for tokens in fold.tokens] == [record.tokens for record in fold.records]


def test_equal_compositions_are_assigned_by_name():
    assert names(sized(B=4, A=4, C=4).folds(2)) == [["A", "C"], ["B"]]
    assert names(sized(C=4, B=4, A=4).folds(2)) == [["C", "A"], ["B"]]


def test_spellings_of_a_title_are_one_composition():
    titles = ["Liszt: Après une lecture, S. 161", "Other: Étude", "Liszt: Aprés  une Lecture S.161", "Liszt: S. 162"]
    pieces = pieces_of([np.zeros(8, np.uint16)] * 4, titles)
    assert names(pieces.folds(3)) == [[titles[0], titles[2]], [titles[3]], [titles[1]]]


def test_joined_folds_are_all_pieces_again():
    numbered = numbered_pieces()
    folds = numbered.folds(3)
    joined = Pieces.join(folds)
    assert sorted(record.name for record in joined.records) == sorted(record.name for record in numbered.records)
    for tokens, record in zip(joined.tokens, joined.records, strict=True):
        np.testing.assert_array_equal(tokens, numbered.tokens[int(record.name)])
    assert len(Pieces.join(folds[1:])) == len(numbered) - len(folds[0])


@pytest.mark.parametrize("count", [0, 4])
def test_impossible_numbers_of_folds_are_refused(count):
    with pytest.raises(DatasetError, match=f"expected 1 to 3 folds, .* got {count}"):
        sized(A=[1, 2], B=3, C=4).folds(count)


def test_data_prepared_by_earlier_versions_opens_but_has_no_folds(folder):
    assert len(Pieces.open(folder, "train").folds(3)) == 3
    forget_compositions(folder)
    pieces = Pieces.open(folder, "train")
    assert [len(tokens) - 2 for tokens in pieces.tokens] == [record.tokens for record in pieces.records]
    with pytest.raises(DatasetError, match=r"manifest\.json: .* 2004/aria\.midi\. Prepare the data again"):
        pieces.folds(3)


# --- augmented copies ------------------------------------------------------------------------------------------------


def test_augmented_copies_are_of_the_same_compositions_and_drawn_by_seed():
    music = random_pieces()
    one, again, other = (music.augmented_copies(seed) for seed in (1, 1, 2))
    assert one.records == music.records
    assert one.augmentations == again.augmentations != other.augmentations
    assert all(map(np.array_equal, one.tokens, again.tokens))
    halves = Pieces.join([music, one]).folds(2)
    for half in halves:
        names = [record.name for record in half.records]
        assert sorted(names) == sorted(2 * list(set(names)))  # a piece and its copy are in one fold
        assert half.augmentations.count(ORIGINAL) == len(half) / 2
