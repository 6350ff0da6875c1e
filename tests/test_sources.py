"""Training data with wishes and of several sources: tables, windows, batches."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from tiny_maestro import midi_bytes as midi
from tiny_maestro import numbered_pieces, random_pieces, write_folder

from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.gaps import Gaps
from data_pipeline.loader import LoaderConfig, batches
from data_pipeline.manifest import DatasetError
from data_pipeline.prepare import prepare_midi
from data_pipeline.sources import read_sources
from data_pipeline.window_wishes import WindowWishes, WishDropout
from data_pipeline.wish_table import wish_table
from music_ar.features.measured import measure
from music_ar.features.wish_options import NUMBERS, WISHES
from music_ar.features.wishes import WishTable
from music_ar.tokens.vocabulary import MIDDLE, PAD

TABLE = WishTable(
    edges=((0.0, 5.0, 10.0, 20.0), (1.0, 40.0, 127.0), (30.0, 60.0, 100.0), (0.0, 0.5, 1.0), (0.0, 0.3, 0.8)),
    composers=("Frédéric Chopin",),
    eras=("Romantic",),
    sources=("a", "b"),
)
NEVER, ALWAYS = (WishDropout(wish_dropout=chance, without_wishes=0.0) for chance in (0.0, 1.0))


def loader(**changes: Any):
    options: dict[str, Any] = {"context": 256, "latents": 128, "batch_size": 4, "seed": 0, "threads": 0}
    return LoaderConfig(**(options | changes))


def by_chopin(pieces, source):
    records = tuple(dataclasses.replace(record, composition="Chopin, F.: Étude") for record in pieces.records)
    return dataclasses.replace(pieces, records=records, source=source)


# Wishes of windows.


def test_the_wishes_of_a_window_are_those_of_its_targets_after_augmentation():
    pieces = by_chopin(random_pieces(), "b")
    config = loader(augmentation=Augmentation(velocity_bins=3), wishes=WindowWishes(table=TABLE, dropout=NEVER))
    stream = batches(pieces, config=config)
    for _ in range(5):
        batch: Any = next(stream)
        for tokens, weights, found in zip(batch["tokens"], batch["weights"], batch["wishes"], strict=True):
            start = len(tokens) - len(weights) + int((weights > 0).argmax())
            names = {"composer": "Frédéric Chopin", "era": "Romantic", "source": "b"}
            np.testing.assert_array_equal(found, TABLE.nearest_ids(measure(tokens, start), names)[None])


def test_wishes_do_not_change_the_windows_and_are_absent_by_default():
    config = loader(augmentation=Augmentation())
    without = next(batches(random_pieces(), config=config))
    wishes = WindowWishes(table=TABLE, dropout=NEVER)
    with_wishes = next(batches(random_pieces(), config=dataclasses.replace(config, wishes=wishes)))
    assert "wishes" not in without
    for name, array in without.items():
        np.testing.assert_array_equal(with_wishes[name], array)


def test_the_wishes_of_a_window_with_a_gap_are_those_of_its_middle():
    pieces, wishes = by_chopin(random_pieces(), "b"), WindowWishes(table=TABLE, dropout=NEVER)
    stream = batches(pieces, config=loader(wishes=wishes, gaps=Gaps(share=1.0, context=256)))
    checked = 0
    for _ in range(8):
        batch: Any = next(stream)
        for tokens, found in zip(batch["tokens"], batch["wishes"], strict=True):
            if MIDDLE in tokens:
                middle = int(np.flatnonzero(tokens == MIDDLE)[0]) + 1
                names = {"composer": "Frédéric Chopin", "era": "Romantic", "source": "b"}
                np.testing.assert_array_equal(found, TABLE.nearest_ids(measure(tokens, middle), names)[None])
                checked += bool(found[0, 0])
    assert checked > 3


def drawn(dropout, count=400):
    pieces, rng = by_chopin(random_pieces(), "a"), np.random.default_rng(0)
    tokens, weights = pieces.tokens[4].astype(np.int32), np.ones(128, np.float32)
    wishes = WindowWishes(table=TABLE, dropout=dropout)
    return np.stack([wishes.draw(tokens, weights, "Chopin", "a", rng)[0] for _ in range(count)]) > 0


def test_wishes_are_left_out_one_by_one_and_all_together():
    assert drawn(NEVER, 2).all()
    assert not drawn(ALWAYS, 2).any()
    given = drawn(WishDropout(wish_dropout=0.3, without_wishes=0.25))
    np.testing.assert_allclose(given.mean(axis=0), 0.7 * 0.75, atol=0.1)
    alone = drawn(WishDropout(wish_dropout=0.0, without_wishes=0.25))
    assert (alone.all(axis=1) | ~alone.any(axis=1)).all()
    assert 0.15 < (~alone.any(axis=1)).mean() < 0.35


def test_music_before_the_last_control_token_is_not_measured():
    pieces = random_pieces()
    first, second = (tokens[1:-1].astype(np.int32) for tokens in pieces.tokens[3:5])
    tokens = np.concatenate([first, [389], second])
    wishes = WindowWishes(table=TABLE, dropout=NEVER)
    weights = np.ones(len(tokens) - 1, np.float32)
    expected = TABLE.nearest_ids(measure(tokens, len(first) + 1), {})
    wishes = dataclasses.replace(wishes, part=len(weights))
    found = wishes.draw(tokens, weights, None, None, np.random.default_rng(0))
    np.testing.assert_array_equal(found, expected[None])


def test_each_part_of_a_window_has_the_wishes_of_its_own_targets():
    tokens = random_pieces().tokens[4].astype(np.int32)[1:-1][:401]
    wishes = WindowWishes(table=TABLE, dropout=NEVER, part=100)
    weights = np.ones(400, np.float32)
    found = wishes.draw(tokens, weights, None, None, np.random.default_rng(0))
    expected = [TABLE.nearest_ids(measure(tokens[: 101 + 100 * p], 1 + 100 * p), {}) for p in range(4)]
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found, axis=0)) > 1

    # The first 230 targets count for nothing: 70 of the third part are enough, and what comes before has their ids.
    weights[:230] = 0
    found = wishes.draw(tokens, weights, None, None, np.random.default_rng(0))
    third, fourth = TABLE.nearest_ids(measure(tokens[:301], 231), {}), expected[3]
    np.testing.assert_array_equal(found, [third, third, third, fourth])
    # 30 of the third part are too few: they are measured with the fourth.
    weights[:270] = 0
    found = wishes.draw(tokens, weights, None, None, np.random.default_rng(0))
    np.testing.assert_array_equal(found, [TABLE.nearest_ids(measure(tokens, 271), {})] * 4)


def test_a_table_holds_what_the_data_has():
    table = wish_table([by_chopin(random_pieces(), "a"), dataclasses.replace(random_pieces(), source="b")], 64)
    assert (table.composers, table.eras, table.sources) == (("Frédéric Chopin",), ("Romantic",), ("a", "b"))
    values = {name: [] for name in NUMBERS}
    for tokens in random_pieces().tokens:
        for name, value in zip(NUMBERS, measure(tokens.astype(np.int32)), strict=True):
            values[name] += [] if value is None else [value]
    density, register = (table.edges[NUMBERS.index(name)] for name in ("density", "register"))
    assert density[0] <= np.median(values["density"]) <= density[-1]
    assert register[0] <= np.median(values["register"]) <= register[-1]
    assert len(table.sizes) == len(WISHES)


# Several sources.


def sources_of(tokens, first):
    """Which of two sources each window is from: their numbers are 0 to 60,000 and above."""
    return (tokens[:, -1] >= first).astype(int)


@pytest.mark.parametrize("shares", [(0.75, 0.25), (0.1, 0.9)])
def test_batches_are_mixed_by_the_shares(shares):
    one = numbered_pieces()
    other = dataclasses.replace(one, tokens=tuple((tokens + 30_000).astype(np.uint16) for tokens in one.tokens))
    stream = batches(one, beside=[other], config=loader(context=24, latents=8, shares=shares))
    found = np.concatenate([sources_of(next(stream)["tokens"], 30_000) for _ in range(100)])
    assert found.mean() == pytest.approx(shares[1], abs=0.02)
    assert set(found[:20].tolist()) == {0, 1}  # from the start


def test_each_part_of_a_batch_is_mixed_with_other_windows():
    music = numbered_pieces()
    first, second = music.folds(2)
    other = dataclasses.replace(music, tokens=tuple((tokens + 30_000).astype(np.uint16) for tokens in music.tokens))
    config = loader(context=24, latents=8, batch_size=8, shares=(0.5, 0.5))
    stream = batches(first, second, beside=[other], config=config)
    rows = np.stack([next(stream)["tokens"] for _ in range(50)])
    foreign = rows[:, :, -1] >= 30_000
    assert foreign[:, :4].mean() == foreign[:, 4:].mean() == 0.5
    for fold, half in ((first, slice(4)), (second, slice(4, None))):
        own = rows[:, half][~foreign[:, half]]
        assert set(own[:, -1].tolist()) <= {int(token) for tokens in fold.tokens for token in tokens} | {PAD}
    assert not (rows[:, :4] == rows[:, 4:])[foreign[:, :4] & foreign[:, 4:]].all(axis=-1).any()  # other windows in each


def test_mixed_batches_resume_and_are_shared_between_processes():
    first, other = random_pieces(), random_pieces()
    config = loader(shares=(0.6, 0.4), batch_size=2)
    stream = batches(first, beside=[other], config=config)
    expected = [next(stream)["tokens"] for _ in range(4)]
    resumed = batches(first, beside=[other], config=config)
    again = batches(first, beside=[other], config=config)
    for _ in range(2):
        next(again)
    resumed.set_state(again.get_state())
    np.testing.assert_array_equal(next(resumed)["tokens"], expected[2])


def test_a_share_is_needed_for_a_part_and_for_each_dataset_beside_it():
    with pytest.raises(ValueError, match="expected 1 shares, of a part and what is beside it, got 2"):
        batches(random_pieces(), config=loader(shares=(0.5, 0.5)))


def table_file(folder, text):
    path = folder / "sources.csv"
    path.write_text(text)
    return path


def test_a_table_of_sources_is_read(tmp_path):
    rows = "maestro,m,3,x\nrolls,../r,0.5,\nremote,s3://bucket/data,0.5,\n"
    found = read_sources(table_file(tmp_path, f"source,data,share,note\n{rows}"))
    assert [(each.name, each.data, each.share) for each in found] == [
        ("maestro", str(tmp_path / "m"), 0.75),
        ("rolls", str(tmp_path / ".." / "r"), 0.125),
        ("remote", "s3://bucket/data", 0.125),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source,data\na,b\n", "found no share"),
        ("source,data,share\n", "no rows"),
        ("source,data,share\na,b,0\n", 'line 2: share must be a number above 0, got "0"'),
        ("source,data,share\na,b,many\n", 'share must be a number above 0, got "many"'),
        ("source,data,share\n,b,1\n", "expected a name and a folder"),
        ("source,data,share\na,b,1\na,c,1\n", "each source must have one row, a has more"),
        ("source,data,share\na,b\n", 'share must be a number above 0, got ""'),
    ],
)
def test_a_wrong_table_of_sources_is_refused(tmp_path, text, said):
    with pytest.raises(DatasetError) as error:
        read_sources(table_file(tmp_path, text))
    assert said in str(error.value)


# Composers of your own files.


@pytest.fixture
def own_files(tmp_path):
    return write_folder(tmp_path / "set" / "part", {f"{name}.mid": midi(seed) for seed, name in enumerate("abc")})


@pytest.mark.parametrize("prefix", ["", "part/", "elsewhere/set/part/"])
def test_a_table_tells_composers_wherever_its_paths_begin(own_files, tmp_path, prefix):
    table = tmp_path / "pieces.csv"
    table.write_text(
        f"file,composer,title,year\n{prefix}a.mid,Chopin,Waltz: in A,1\n{prefix}b.mid,Liszt,,2\nz.mid,X,,3\n"
    )
    prepare_midi(own_files, tmp_path / "out", table=table, validation=0.0, test=0.0, workers=1)
    records = {record.name: record for record in Pieces.open(tmp_path / "out", "train").records}
    assert [records[f"{name}.mid"].composition for name in "abc"] == ["Chopin: Waltz: in A", "Liszt: b.mid", "c.mid"]
    assert [records[f"{name}.mid"].composer for name in "abc"] == ["Chopin", "Liszt", None]


@pytest.mark.parametrize(
    ("text", "said"),
    [("file,name\na.mid,b\n", "found no composer"), ("file,composer\nx.mid,b\n", "none of its 1 rows names one")],
)
def test_a_table_that_tells_nothing_is_refused(own_files, tmp_path, text, said):
    table = tmp_path / "pieces.csv"
    table.write_text(text)
    with pytest.raises(DatasetError) as error:
        prepare_midi(own_files, tmp_path / "out", table=table, validation=0.0, test=0.0, workers=1)
    assert said in str(error.value)
