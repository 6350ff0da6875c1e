"""Passages, the index of them, and the search, with an encoder of a few lines in place of a trained one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histogram import CUT, Histogram, index_of
from hypothesis import given
from hypothesis import strategies as st
from tiny_maestro import PIECES, archive_files, random_performance, write_zip

from data_pipeline.passage_index import index_split
from data_pipeline.prepare import prepare_maestro
from music_ar.embedding.index import PassageIndex, PassageIndexError, directions, rounded
from music_ar.embedding.passages import PassageGrid
from music_ar.embedding.search import MAX_QUERY_S, SearchError, nearest, overlap_with
from music_ar.midi.performance import Performance


@pytest.fixture(scope="module")
def pieces():
    return [random_performance(seed, 100) for seed in range(6)]


@pytest.fixture(scope="module")
def index(pieces):
    return index_of(pieces)


def joined(*parts):
    """The notes of all parts, as they are timed."""
    names = ("onset_s", "offset_s", "pitch", "velocity")
    columns: Any = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Performance(**columns)


# --- passages ---------------------------------------------------------------------------------------------------------


def steady(seconds, notes_per_s=10, first_s=0.0):
    onset_s = first_s + np.arange(int(seconds * notes_per_s)) / notes_per_s
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + 1 / notes_per_s,
        pitch=np.full(len(onset_s), 60),
        velocity=np.full(len(onset_s), 64),
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (3, [(0, 3)]),  # shorter than a passage
        (4, [(0, 4)]),
        (5, [(0, 4), (1, 5)]),  # the last one ends with the piece
        (8, [(0, 4), (2, 6), (4, 8)]),
        (0.7, []),  # seven notes
    ],
)
def test_passages_of_a_piece(seconds, expected):
    np.testing.assert_allclose(CUT.spans(steady(seconds)), np.reshape(expected, (-1, 2)), atol=1e-9)


def test_passages_begin_with_the_first_note_and_skip_silence():
    piece = steady(4, first_s=10)
    assert CUT.spans(piece)[0].tolist() == [10, 14]
    later = steady(4, first_s=40)
    inside = [len(each) for each in CUT.cut(joined(piece, later))]
    assert inside == [40, 20, 20, 40]


def test_no_notes_no_passages():
    assert CUT.spans(Performance.empty()).shape == (0, 2)


@given(st.integers(0, 1000), st.integers(8, 300))
def test_passages_cover_every_note(seed, notes):
    piece = random_performance(seed, notes)
    dense = PassageGrid(length_s=8.0, hop_s=4.0)
    covered = np.zeros(len(piece), bool)
    for begin_s, end_s in dense.spans(piece):
        assert end_s - begin_s <= dense.length_s + 1e-9
        covered |= (piece.onset_s >= begin_s) & (piece.onset_s < end_s)
    assert covered.all()


# --- the index --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_rounding_hardly_turns_a_vector(seed):
    vectors = np.random.default_rng(seed).normal(size=(5, 64)).astype(np.float32)
    exact = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (np.sum(exact * directions(rounded(vectors)), axis=1) > 0.9998).all()


def test_saved_and_loaded_it_is_the_same(index, tmp_path):
    index.save(tmp_path / "index")
    loaded = PassageIndex.load(tmp_path / "index")
    for field in dataclasses.fields(index):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(index, field.name))
    assert (tmp_path / "index").stat().st_size < len(index) * (128 + 10) + 2000
    assert list(tmp_path.iterdir()) == [tmp_path / "index"]


def test_usual_similarity_is_that_of_other_pieces(pieces):
    alike = index_of([pieces[0], pieces[0], pieces[1]]).usual
    assert alike[1] == pytest.approx(1, abs=1e-3)  # most passages occur in the other copy
    assert (index_of(pieces).usual[:2] < 0.95).all()
    assert index_of(pieces[:1]).usual.tolist() == [0, 0, 0]


def test_nothing_to_index():
    with pytest.raises(PassageIndexError, match="the train split has no passage with enough notes"):
        index_of([steady(0.3)])


def broken(index, tmp_path, change):
    path = tmp_path / "index"
    index.save(path)
    data = change(path.read_bytes())
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:0], "expected an index of passages"),
        (lambda data: b"MThd" + data, "expected an index of passages"),
        (lambda data: data[:-9], "expected an index of passages"),
        (lambda data: data.replace(b"music-ar passages 1", b"music-ar passages 9"), "Make it again with this version"),
        (lambda data: data.replace(b'"usual"', b'"Usual"'), "damaged or edited"),
    ],
)
def test_files_that_are_no_index_are_refused(index, tmp_path, change, message):
    with pytest.raises(PassageIndexError, match=message) as refused:
        PassageIndex.load(broken(index, tmp_path, change))
    assert str(tmp_path / "index") in str(refused.value)


def test_a_missing_index_says_how_to_make_it(tmp_path):
    with pytest.raises(PassageIndexError, match=r"no such file.*similar --build"):
        PassageIndex.load(tmp_path / "none")


def test_an_index_of_other_data_or_of_another_encoder_is_refused(index, pieces):
    with pytest.raises(PassageIndexError, match="made with the encoder"):
        nearest(index, Histogram("another"), pieces[0])
    with pytest.raises(PassageIndexError, match="was made from other data"):
        index.check_data("e" * 64, "index")
    index.check_data("d" * 64, "index")


def test_a_prepared_split_is_indexed_with_titles_and_composers(tmp_path):
    maestro = write_zip(tmp_path / "maestro.zip", archive_files())
    manifest = prepare_maestro(maestro, prepared := tmp_path / "data", workers=1).manifest
    shares = []
    index = index_split(prepared, "train", Histogram(), passages=CUT, on_progress=shares.append)
    assert [(piece.name, str(piece)) for piece in index.pieces] == [
        (name, f"Composer, A.: {Path(name).stem}") for name, split in PIECES.items() if split == "train"
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    index.check_data(manifest.split_digest("train"), "index")
    with pytest.raises(PassageIndexError, match="other data"):
        index.check_data(manifest.split_digest("validation"), "index")


# --- the search -------------------------------------------------------------------------------------------------------


def test_an_identical_passage_comes_first(index, pieces):
    for number, piece in enumerate(pieces):
        begin_s, end_s = CUT.spans(piece)[2]
        match, *others = nearest(index, Histogram(), piece.crop(begin_s, end_s), count=3)
        assert match.number == number
        assert match.piece.title == f"Study {number}"
        assert match.similarity == pytest.approx(1, abs=1e-3)
        assert (match.start_s, match.end_s) == pytest.approx((begin_s, end_s), abs=1e-5)
        assert [each.similarity for each in others] == sorted((each.similarity for each in others), reverse=True)
        assert len({each.number for each in (match, *others)}) == 3


def test_it_says_which_passage_of_the_query_is_alike(index, pieces):
    """A query of two halves from two pieces finds both, each at its place."""
    first, second = pieces[1].crop(0, 4), pieces[4].crop(4, 8).shift(4)
    found = {match.number: match for match in nearest(index, Histogram(), joined(first, second), count=2)}
    assert set(found) == {1, 4}
    assert found[1].query_start_s < 1 < 3 < found[4].query_start_s
    assert found[4].start_s == pytest.approx(4, abs=1)


def test_as_many_as_there_are(index, pieces):
    assert len(nearest(index, Histogram(), pieces[0], count=50)) == len(pieces)


def brute_force(index, query):
    """Piece -> highest cosine, one pair of passages at a time."""
    best = {}
    for vector, piece in zip(index.vectors.astype(float), index.piece.tolist(), strict=True):
        for other in query.astype(float):
            cosine = vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)
            best[piece] = max(best.get(piece, -2), cosine)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(index, seed):
    query = random_performance(50 + seed, 150)
    best = brute_force(index, Histogram().embed(list(CUT.cut(query))))
    found = nearest(index, Histogram(), query, count=6)
    assert {match.number: match.similarity for match in found} == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Performance.empty(), "no notes"),
        (steady(0.5), "at least 8, and it has 5"),
        (steady(20, first_s=MAX_QUERY_S), "4.01 hours long, and the longest .* is 4 hours"),
    ],
)
def test_pieces_that_cannot_be_searched_for(index, piece, message):
    with pytest.raises(SearchError, match=message):
        nearest(index, Histogram(), piece)


@pytest.mark.parametrize("semitones", [0, 5])
def test_shared_notes_and_where_they_are(pieces, semitones):
    copied = pieces[2].crop(3, 6)
    assert len(copied) > 10
    moved = Performance(
        onset_s=copied.onset_s * 1.2 + 7,
        offset_s=copied.offset_s * 1.2 + 7,
        pitch=copied.pitch + semitones,
        velocity=copied.velocity,
    )
    found = overlap_with(moved, pieces)
    assert (found.source, found.notes) == (2, len(copied))
    assert (found.start_s, found.end_s) == pytest.approx((moved.onset_s[0], moved.onset_s[-1]), abs=0.05)
    assert (found.source_start_s, found.source_end_s) == pytest.approx(
        (copied.onset_s[0] + 3, copied.onset_s[-1] + 3), abs=0.05
    )


def test_nothing_shared():
    assert overlap_with(steady(5).crop(0, 0.15), [Performance.empty()]).notes == 0
    assert json.dumps(dataclasses.asdict(overlap_with(steady(5), []))).startswith('{"notes": 0')
