"""MIDI files to shards and manifest: what is written, that it is written completely or not at all, what is refused."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_maestro import PIECES, archive_files, forget_compositions, midi_bytes, write_folder, write_zip

from app.commands.prepare import Prepare
from data_pipeline import maestro as reader
from data_pipeline import prepare
from data_pipeline.manifest import SPLITS, DatasetError, Manifest
from data_pipeline.prepare import prepare_maestro, prepare_midi
from data_pipeline.splits import assign_splits
from music_ar.midi.io import read_midi
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import END, FINGERPRINT, START

ROOT = Path(__file__).parents[1]


@pytest.fixture
def archive(tmp_path):
    return write_zip(tmp_path / "maestro-v3.0.0-midi.zip", archive_files())


@pytest.fixture
def output(tmp_path):
    return tmp_path / "tokens"


def maestro(source, output):
    return prepare_maestro(source, output, workers=1).manifest


def own(folder, output, **options):
    return prepare_midi(folder, output, workers=1, **options).manifest


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_every_piece_between_start_and_end(archive, output):
    manifest = maestro(archive, output)
    files = archive_files()
    found = {}
    for shard in manifest.shards:
        tokens = np.load(shard.verified_path(output), mmap_mode="r")
        assert tokens.dtype == np.uint16
        for piece in shard.pieces:
            whole = tokens[piece.start : piece.start + piece.tokens + 2]
            assert (whole[0], whole[-1]) == (START, END)
            performance = read_midi(files[piece.name])
            np.testing.assert_array_equal(whole[1:-1], encode(performance))
            assert piece.notes == len(performance)
            assert piece.seconds == pytest.approx(performance.duration_s, abs=1e-3)
            found[piece.name] = shard.split
    assert found == PIECES


def test_manifest_on_disk(archive, output):
    manifest = maestro(archive, output)
    on_disk = json.loads((output / "manifest.json").read_text())
    assert on_disk["fingerprint"] == FINGERPRINT
    performances = [read_midi(archive_files()[name]) for name, split in PIECES.items() if split == "train"]
    assert on_disk["splits"]["train"] == {
        "pieces": 3,
        "notes": sum(len(performance) for performance in performances),
        "tokens": sum(len(encode(performance)) for performance in performances),
        "hours": pytest.approx(sum(performance.duration_s for performance in performances) / 3600, abs=1e-4),
    }
    assert {(shard["split"], len(shard["sha256"])) for shard in on_disk["shards"]} == {(split, 64) for split in SPLITS}
    assert Manifest.load(output) == manifest


def test_zip_and_folder_give_the_same_shards(archive, output, tmp_path):
    zipped = maestro(archive, output)
    folder = write_folder(tmp_path / "unpacked", archive_files())
    assert maestro(folder, tmp_path / "other").shards == zipped.shards


def test_the_number_of_processes_changes_nothing(output, tmp_path):
    folder = write_folder(tmp_path / "midi", {f"{number}.mid": midi_bytes(number, 5) for number in range(10)})
    alone = own(folder, output)
    assert prepare_midi(folder, tmp_path / "other", workers=2).manifest == alone


def test_a_split_is_cut_into_shards(archive, output, monkeypatch):
    whole = maestro(archive, output)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 10)
    cut = maestro(archive, output.with_name("cut"))
    assert [(shard.split, len(shard.pieces)) for shard in cut.shards] == [
        (split, 1) for split in ("train", "train", "train", "validation", "test")
    ]
    assert [shard.file[:12] for shard in cut.shards[:2]] == ["train-00000-", "train-00001-"]
    assert cut.splits == whole.splits


def test_running_again_changes_nothing(archive, output):
    first = prepare_maestro(archive, output, workers=1)
    times = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = prepare_maestro(archive, output, workers=1)
    assert (first.was_up_to_date, again.was_up_to_date) == (False, True)
    assert again.manifest == first.manifest
    assert times == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_grows_to_one(archive, output, workers):
    shares = []
    prepare_maestro(archive, output, workers=workers, on_progress=shares.append)
    assert shares == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_command_prints_the_splits_and_what_was_skipped(own_midi, output, capsys):
    command = Prepare(midi=own_midi, output=str(output), workers=1)
    (own_midi / "book 1" / "broken.mid").write_bytes(b"MThd, not really")
    assert command.run() == 3
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()] == [
        ["split", "pieces"],
        ["train", "8"],
        ["validation", "1"],
        ["test", "1"],
    ]
    assert "skipped 1 of 11 files: book 1/broken.mid: " in printed.err
    assert "up to date" not in printed.err
    assert command.run() == 3
    again = capsys.readouterr()
    assert again.out == printed.out
    assert f"{output} is up to date" in again.err
    assert "skipped 1 of 11 files: book 1/broken.mid: " in again.err
    (own_midi / "book 1" / "broken.mid").unlink()
    assert command.run() == 0
    assert "skipped" not in capsys.readouterr().err


def test_changed_inputs_replace_the_data_set_and_nothing_else(archive, output):
    first = maestro(archive, output)
    (output / "notes.txt").write_text("mine")
    write_zip(archive, {**archive_files(), "2004/aria.midi": midi_bytes(99, 70)})
    second = maestro(archive, output)
    assert second.shards[0].sha256 != first.shards[0].sha256
    assert second.shards[1:] == first.shards[1:]
    assert set(content(output)) == {"manifest.json", "notes.txt", *(shard.file for shard in second.shards)}


def test_compositions_are_recorded(archive, own_midi, output):
    manifest = maestro(archive, output)
    assert compositions_of(manifest)["2004/aria.midi"] == "Composer, A.: aria"
    manifest = own(own_midi, output)
    assert all(composition == name for name, composition in compositions_of(manifest).items())


def test_other_compositions_of_the_same_files_are_no_longer_up_to_date(archive, output):
    first = maestro(archive, output)
    files = archive_files()
    table = files["maestro-v3.0.0.csv"].replace(b"bagatelle,train", b"aria,train")
    second = maestro(write_zip(archive, {**files, "maestro-v3.0.0.csv": table}), output)
    assert compositions_of(second)["2004/bagatelle.midi"] == "Composer, A.: aria"
    assert [shard.sha256 for shard in second.shards] == [shard.sha256 for shard in first.shards]


def test_the_manifest_of_an_earlier_version_opens_and_preparing_again_adds_compositions(archive, output):
    prepared = maestro(archive, output)
    forget_compositions(output)
    assert compositions_of(Manifest.load(output)) == dict.fromkeys(PIECES)
    assert maestro(archive, output) == prepared == Manifest.load(output)


def compositions_of(manifest):
    return {piece.name: piece.composition for shard in manifest.shards for piece in shard.pieces}


def test_damaged_shards_are_written_again(archive, output):
    manifest = maestro(archive, output)
    whole = content(output)
    (output / manifest.shards[0].file).write_bytes(b"")
    (output / manifest.shards[1].file).unlink()
    maestro(archive, output)
    assert content(output) == whole


@pytest.mark.parametrize("file", [1, 2, 3, 4])
def test_an_interrupted_run_leaves_the_old_data_set_complete(archive, output, monkeypatch, file):
    """Three shards and the manifest are written, each renamed into place."""
    maestro(archive, output)
    whole = content(output)
    write_zip(archive, {**archive_files(), "2004/aria.midi": midi_bytes(99), "2018/etude.midi": midi_bytes(98)})
    rename, calls = Path.replace, itertools.count(1)

    def interrupted(path, target):
        if next(calls) == file:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            maestro(archive, output)
    assert content(output) == whole


def test_leftovers_of_a_killed_run_are_removed(archive, output):
    output.mkdir()
    (output / ".part.train-00000-0123456789ab.npy").write_bytes(b"half")
    (output / "train-00000-0123456789ab.npy").write_bytes(b"whole, but in no manifest")
    (output / ".part.manifest.json").write_bytes(b"{")
    manifest = maestro(archive, output)
    assert set(content(output)) == {"manifest.json", *(shard.file for shard in manifest.shards)}


def test_an_unreadable_maestro_file_is_named_and_nothing_is_written(archive, output):
    write_zip(archive, {**archive_files(), "2006/dance.midi": b"not MIDI", "2018/etude.midi": b""})
    with pytest.raises(DatasetError, match=r"2 of 5 files are not usable MIDI: 2006/dance\.midi: .*2018/etude\.midi"):
        maestro(archive, output)
    assert content(output) == {}


# --- other MIDI files -------------------------------------------------------------------------------------------------


@pytest.fixture
def own_midi(tmp_path):
    files = {f"book {number % 3}/{number}.mid": midi_bytes(number, 5) for number in range(9)}
    return write_folder(tmp_path / "midi", {**files, "LOUD.MIDI": midi_bytes(9, 5), "notes.txt": b"no MIDI"})


def names_of(manifest):
    return {piece.name: shard.split for shard in manifest.shards for piece in shard.pieces}


def test_midi_files_in_subfolders_are_found_and_split(own_midi, output):
    manifest = own(own_midi, output, validation=0.2, test=0.1)
    assert [manifest.splits[split].pieces for split in SPLITS] == [7, 2, 1]
    expected = {path.relative_to(own_midi).as_posix() for path in own_midi.rglob("*.[mM]*")}
    assert set(names_of(manifest)) == expected


def test_unusable_files_are_skipped_and_named(own_midi, output):
    (own_midi / "book 1" / "broken.mid").write_bytes(b"MThd, not really")
    (own_midi / "empty.mid").write_bytes(b"")
    manifest = own(own_midi, output)
    assert set(manifest.skipped) == {"book 1/broken.mid", "empty.mid"}
    assert all(manifest.skipped.values())
    assert sum(counts.pieces for counts in manifest.splits.values()) == 10
    assert own(own_midi, output) == manifest


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes and devices")
@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_no_readable_file_is_skipped_and_never_waited_for(own_midi, output, monkeypatch, workers):
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 2**20)
    with (own_midi / "large.mid").open("wb") as file:
        file.truncate(65 * 2**20)  # too large for the workers, too, which have the real limit
    os.mkfifo(own_midi / "pipe.mid")
    (own_midi / "device.mid").symlink_to("/dev/zero")
    (own_midi / "nowhere.mid").symlink_to(own_midi / "nowhere")
    (own_midi / "loop.mid").symlink_to(own_midi / "loop.mid")
    (own_midi / "folder.mid").mkdir()
    prepared = prepare_midi(own_midi, output, workers=workers)
    reasons = {name: reason.partition("cannot be read ")[2] for name, reason in prepared.manifest.skipped.items()}
    assert reasons == {
        "device.mid": "(it is a device, not a file).",
        "large.mid": f"(it has more than {1 if workers == 1 else 64} MB).",
        "loop.mid": "(Too many levels of symbolic links).",
        "nowhere.mid": "(No such file or directory).",
        "pipe.mid": "(it is a pipe, not a file).",
    }
    assert prepare_midi(own_midi, output, workers=workers) == prepared._replace(was_up_to_date=True)


def living(group):
    """Processes of a group, without zombies that nobody has waited for."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            states.append([*stat.read_text().rpartition(")")[2].split(), stat.parent.name])
    return [fields for fields in states if int(fields[2]) == group and fields[0] != "Z"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_it_leaves_no_workers_and_a_whole_data_set(tmp_path, output, number):
    music = midi_bytes(1, 5_000)
    folder = write_folder(tmp_path / "many", {f"{number}.mid": music for number in range(600)})
    own(write_folder(tmp_path / "few", {f"{number}.mid": midi_bytes(number, 5) for number in range(3)}), output)
    before = content(output)
    command = [sys.executable, "-m", "app.cli", "prepare", "--midi", folder, "--output", output, "--workers", "2"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        while b"left" not in process.stderr.readline():  # until workers have read some of the files
            assert process.poll() is None
        assert len(living(process.pid)) >= 3
        process.send_signal(number)
        process.wait(timeout=60)
        deadline = time.monotonic() + 30
        while (left := living(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for fields in left:
            os.kill(int(fields[-1]), signal.SIGKILL)
        errors = process.stderr.read()
    assert not left
    assert b"Traceback" not in errors
    assert content(output) == before
    assert process.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(own_midi, output):
    def kill_workers(_):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(DatasetError, match=r"a worker process was killed, .* try fewer workers"):
        prepare_midi(
            write_folder(own_midi / "more", {f"{number}.mid": midi_bytes(number, 5) for number in range(200)}),
            output,
            workers=2,
            on_progress=kill_workers,
        )
    assert content(output) == {}


def test_splits_may_be_empty(own_midi, output):
    manifest = own(own_midi, output, validation=0.0, test=0.0)
    assert manifest.splits["train"].pieces == 10
    assert manifest.splits["test"].pieces == 0
    assert Manifest.load(output) == manifest


def test_the_seed_decides_the_splits(own_midi, output):
    splits = [names_of(own(own_midi, output, seed=seed)) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({str(sorted(split.items())) for split in splits}) > 1


@given(
    st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=3, max_size=40),
    st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.randoms(),
)
def test_every_file_has_one_split_whatever_the_order(names, validation, test, random):
    assigned = assign_splits(sorted(names), validation=validation, test=test)
    assert set(assigned) == names
    assert set(assigned.values()) <= set(SPLITS)
    for split, share in (("validation", validation), ("test", test)):
        count = list(assigned.values()).count(split)
        assert abs(count - share * len(names)) <= 1
        assert (count > 0) == (share > 0)
    shuffled = sorted(names)
    random.shuffle(shuffled)
    assert assign_splits(shuffled, validation=validation, test=test) == assigned


def test_folders_that_cannot_be_prepared(tmp_path, own_midi, output):
    (tmp_path / "empty").mkdir()
    two = write_folder(tmp_path / "two", {"a.mid": midi_bytes(0), "b.mid": midi_bytes(1)})
    bad = write_folder(tmp_path / "bad", {f"{number}.mid": b"" for number in range(5)})
    (tmp_path / "file").write_text("in the way")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "absent", {}, r"absent: no such zip or folder"),
        (tmp_path / "empty", {}, r"empty: no MIDI file"),
        (two, {}, r"The train split would be empty: 2 usable MIDI files, of which 1 for validation and 1 for test"),
        (bad, {}, r"5 of 5 files are not usable MIDI: .*0\.mid"),
        (own_midi, {"validation": 0.5, "test": 0.5}, r"validation and test must be shares .* got 0\.5 and 0\.5"),
        (own_midi, {"test": -0.1}, r"got 0\.1 and -0\.1"),
    ]
    for folder, shares, message in cases:
        with pytest.raises(DatasetError, match=message):
            own(folder, output, **shares)
    with pytest.raises(DatasetError, match=r"file: cannot create this folder"):
        own(own_midi, tmp_path / "file")


# --- the manifest ----------------------------------------------------------------------------------------------------


COUNTS = ("pieces", "notes", "tokens", "hours")


def edit(manifest, **changes):
    return {**manifest, **changes}


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, r"manifest\.json: no such file.*music-ar prepare"),
        (lambda _: "{", r"manifest\.json: cannot be read"),
        (lambda _: "[" * 100_000, r"manifest\.json: cannot be read \(it is nested too deeply\)"),
        (lambda manifest: edit(manifest, source=5), r"manifest\.json: damaged or edited"),
        (lambda manifest: edit(manifest, source={"kind": [1]}), r"manifest\.json: damaged or edited"),
        (lambda manifest: edit(manifest, fingerprint=None), r"manifest\.json: damaged or edited"),
        (
            lambda manifest: edit(manifest, splits=dict.fromkeys(SPLITS, dict.fromkeys(COUNTS, "many"))),
            r'damaged or edited \(pieces must be a whole number of at least 0, got "many"\)',
        ),
        (
            lambda manifest: edit(manifest, shards=[edit(manifest["shards"][0], bytes=1e9)]),
            r"damaged or edited \(bytes must be a whole number",
        ),
        (lambda manifest: edit(manifest, shards=[edit(manifest["shards"][0], file=7)]), r"damaged or edited"),
        (lambda _: [], r"manifest\.json: expected format 1, found None"),
        (lambda manifest: edit(manifest, format=2), r"manifest\.json: expected format 1, found 2"),
        (lambda manifest: edit(manifest, shards=3), r"manifest\.json: damaged or edited"),
        (lambda manifest: edit(manifest, splits={}), r"manifest\.json: damaged or edited"),
        (lambda manifest: edit(manifest, extra=1), r"manifest\.json: damaged or edited.*extra"),
        (
            lambda manifest: edit(manifest, shards=[edit(manifest["shards"][0], file="../../x.npy")]),
            r"manifest\.json: damaged or edited.*\.\./\.\./x\.npy",
        ),
        (
            lambda manifest: edit(manifest, shards=[edit(manifest["shards"][0], pieces=[])]),
            r"manifest\.json: damaged or edited.*pieces end at 0",
        ),
        (
            lambda manifest: edit(
                manifest,
                shards=[edit(manifest["shards"][0], pieces=[edit(manifest["shards"][0]["pieces"][0], start=-5)])],
            ),
            r"manifest\.json: damaged or edited.*start must be .*got -5",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(archive, output, change, message):
    maestro(archive, output)
    path = output / "manifest.json"
    changed = change(json.loads(path.read_text()))
    if changed is None:
        path.unlink()
    else:
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DatasetError, match=message):
        Manifest.load(output)
