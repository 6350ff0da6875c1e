"""Folders here and on fsspec's file systems: the same results, the same atomicity, and one sentence if refused."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_performance
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from test_cli import refusal, run
from test_rendering import contents

from app.commands.prepare import Prepare
from data_pipeline.dataset import Pieces
from data_pipeline.prepare import prepare_midi
from music_ar.midi import write_midi
from music_ar.storage import StorageError, is_url, open_folder, read_path, write_path


class Refusing(MemoryFileSystem):
    """A bucket that refuses writes once `allowed` of them are done."""

    protocol = "refusing"
    allowed = 0
    error: Exception = PermissionError("Access Denied")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("refusing://", "memory://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if Refusing.allowed <= 0:
            raise Refusing.error
        Refusing.allowed -= 1
        super().pipe_file(path, value, mode, **kwargs)


class Breaking(LocalFileSystem):
    """A remote file system that is no object store: a connection may break in the middle of a file."""

    protocol = "breaking"
    breaks = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("breaking://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value[: len(value) // 2] if self.breaks else value, mode, **kwargs)
        if self.breaks:
            raise ConnectionError("the connection broke")


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="paths in addresses are those of other systems")

register_implementation("refusing", Refusing)
register_implementation("breaking", Breaking)


@pytest.fixture(autouse=True)
def empty_memory():
    MemoryFileSystem.store.clear()
    Refusing.allowed, Refusing.error = 0, PermissionError("Access Denied")


@pytest.fixture
def options(tiny_checkpoint):
    return ["--checkpoint", tiny_checkpoint, "--seconds", 2, "--batch-size", 2, "--count", 4]


def stored(url):
    """All files of a remote folder."""
    folder = open_folder(url)
    found = MemoryFileSystem().find(url.removeprefix("memory:/"), detail=False)
    return {(name := path.split("/out/")[1]): folder.read(name) for path in found}


@pytest.mark.parametrize(
    ("path", "url"),
    [("s3://bucket/out", True), ("memory://x", True), ("out", False), ("/a/b", False), ("C:\\music", False),
     ("C://music", False), ("a:b", False)],
)  # fmt: skip
def test_what_is_an_address(path, url):
    assert is_url(path) == url


@pytest.mark.parametrize("kind", ["here", "file", "memory", "breaking"])
def test_every_folder_does_the_same(tmp_path, kind):
    addresses = {
        "here": tmp_path,
        "file": f"file://{tmp_path}",
        "memory": "memory://b",
        "breaking": f"breaking://{tmp_path}",
    }
    folder = open_folder(f"{addresses[kind]}/out" if kind != "here" else tmp_path / "out")
    assert folder.names() == []
    folder.prepare()
    folder.write("a", b"1")
    folder.write("below/b", b"2")
    folder.write("a", b"3")
    assert (folder.read("a"), folder.read("below/b")) == (b"3", b"2")
    assert (folder.names(), folder.names("below")) == (["a"], ["below/b"])
    assert folder.local_copy("a").read_bytes() == b"3"
    assert (folder.exists("a"), folder.exists("b")) == (True, False)
    folder.remove("a")
    folder.remove("a")
    assert folder.names() == []
    with pytest.raises(FileNotFoundError) as missing:
        folder.read("a")
    assert str(missing.value.filename) == str(folder.path("a"))
    assert missing.value.strerror == "No such file or directory"


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_path(f"breaking://{tmp_path}/file", b"before")
    monkeypatch.setattr(Breaking, "breaks", True)
    with pytest.raises(OSError, match="the connection broke") as broken:
        write_path(f"breaking://{tmp_path}/file", b"afterwards")
    assert broken.value.filename == f"breaking://{tmp_path}/file"
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_large_file_is_not_read():
    write_path("memory://b/large", b"x" * 20)
    assert read_path("memory://b/large", max_bytes=20) == b"x" * 20
    with pytest.raises(OSError, match="it has more than"):
        read_path("memory://b/large", max_bytes=19)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://b/out", "pip install s3fs"),
        ("gs://b/out", "pip install gcsfs"),
        ("nowhere://b/out", "Protocol not known"),
    ],
)
def test_an_address_of_no_known_kind(capsys, monkeypatch, options, url, said):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(StorageError, match=said):
        open_folder(url)
    assert said in refusal(capsys, "render", "--output", url, *options)


def test_pieces_are_the_same_in_a_bucket(capsys, options, tmp_path):
    assert run(capsys, "render", "--output", tmp_path / "out", *options, "--keep-best", 1, "--variations", 2)[0] == 0
    assert run(capsys, "render", "--output", "memory://b/out", *options, "--keep-best", 1, "--variations", 2)[0] == 0
    assert stored("memory://b/out") == contents(tmp_path / "out")
    _, text, _ = run(capsys, "render", "--output", "memory://b/out", *options, "--keep-best", 1, "--variations", 2)
    assert "memory://b/out: 0 pieces generated" in text
    assert "4 already complete" in text
    said = refusal(capsys, "render", "--output", "memory://b/out", *options, "--temperature", 0.5)
    assert "memory://b/out/piece-0001-v1.mid was generated with other settings" in said


def test_a_bucket_that_refuses_is_found_out_before_the_work(capsys, options):
    said = refusal(capsys, "render", "--output", "refusing://b/out", *options)
    assert said == "music-ar: cannot write in refusing://b/out: Access Denied; choose another folder with --output"
    Refusing.error = FileNotFoundError("The specified bucket does not exist")
    assert "refusing://b/out: there is no such bucket" in refusal(
        capsys, "render", "--output", "refusing://b/out", *options
    )
    Refusing.error = RuntimeError("Unable to locate\ncredentials")  # of a class that only the package knows
    assert "Unable to locate credentials" in refusal(capsys, "render", "--output", "refusing://b/out", *options)


@pytest.mark.parametrize("allowed", [1, 2, 3, 8])
def test_a_bucket_that_fails_in_the_middle_costs_nothing_that_is_there(capsys, options, allowed, tmp_path):
    """Every piece takes two writes: its file and its line."""
    Refusing.allowed = allowed
    code, _, errors = run(capsys, "render", "--output", "refusing://b/out", *options)
    assert code == 2
    assert f"{(allowed - 1) // 2} pieces are finished and stay in refusing://b/out; run the same command" in errors
    assert "Access Denied" in errors
    Refusing.allowed = 1000
    code, text, _ = run(capsys, "render", "--output", "refusing://b/out", *options)
    assert code == 0
    assert f"{(allowed - 1) // 2} already complete" in text
    run(capsys, "render", "--output", tmp_path / "out", *options)
    assert stored("memory://b/out") == contents(tmp_path / "out")


def test_prompts_come_from_addresses(capsys, tiny_checkpoint, tmp_path, midi_file):
    options = ["--checkpoint", tiny_checkpoint, "--seconds", 1, "--batch-size", 2]
    for name in ("a.mid", "below/b.MID", "notes.txt", "._a.mid"):
        write_path(f"memory://b/prompts/{name}", midi_file.read_bytes())
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "memory://b/prompts/a.mid"}\n{"prompt": "memory://b/prompts/c.mid"}\n')
    assert run(capsys, "render", "memory://b/prompts", "--output", tmp_path / "one", *options)[0] == 0
    assert sorted(contents(tmp_path / "one")) == ["a-v1.mid", "below/b-v1.mid", "manifest.jsonl"]
    code, _, errors = run(
        capsys, "render", "memory://b/prompts/a.mid", "--jobs", jobs, "--output", tmp_path / "two", *options
    )
    assert code == 3
    assert "memory://b/prompts/c.mid: the prompt cannot be read: No such file or directory" in errors
    lines = [json.loads(line) for line in contents(tmp_path / "two")["manifest.jsonl"].splitlines()]
    assert [line["status"] for line in lines] == ["made", "made", "failed"]
    assert "found none" in refusal(capsys, "render", "memory://b/none", "--output", tmp_path / "three", *options)


def test_a_dataset_in_a_bucket(capsys, midi_folder, tiny_checkpoint, tmp_path):
    here, url = tmp_path / "out", "memory://b/out"
    prepare_midi(midi_folder, here, workers=1)
    arguments = ["prepare", "--midi", midi_folder, "--workers", 1, "--output", url]
    assert run(capsys, *arguments)[0] == 0
    assert stored(url) == contents(here)
    write_path(f"{url}/train-00007-0123456789ab.npy", b"of another dataset")
    code, _, errors = run(capsys, *arguments)
    assert (code, "memory://b/out is up to date" in errors) == (0, True)
    assert run(capsys, *arguments, "--seed", 1)[0] == 0
    assert "train-00007-0123456789ab.npy" not in stored(url)
    prepare_midi(midi_folder, here, workers=1, seed=1)
    assert stored(url) == contents(here)
    assert [piece.tolist() for piece in Pieces.open(url, "train").tokens] == [
        piece.tolist() for piece in Pieces.open(here, "train").tokens
    ]
    scores = []
    for data, output in ((here, tmp_path / "scores.json"), (url, "memory://b/scores.json")):
        scored = ["--data", data, "--output", output, "--checkpoint", tiny_checkpoint, "--stride", 16]
        assert run(capsys, "evaluate", *scored, "--max-pieces", 1)[0] == 0
        scores.append(read_path(output, max_bytes=10_000))
    assert scores[0] == scores[1]


def test_a_dataset_in_a_bucket_that_refuses(capsys, tmp_path, tiny_checkpoint, prepared):
    folder = tmp_path / "midi"
    folder.mkdir()
    for seed in range(3):
        write_midi(make_performance(seed, notes=20), folder / f"{seed}.mid")
    arguments = ["prepare", "--midi", folder, "--workers", 1, "--output", "refusing://b/out"]
    assert "cannot create this folder for the shards (Access Denied)" in refusal(capsys, *arguments)
    Refusing.allowed = 2
    assert "cannot be written (Access Denied)" in refusal(capsys, *arguments)
    assert not any(name.endswith((".npy", ".json")) for name in MemoryFileSystem.store)
    scored = ["--data", prepared, "--output", "refusing://b/scores.json", "--checkpoint", tiny_checkpoint]
    assert "refusing://b/.part.music-ar: Access Denied" in refusal(capsys, "evaluate", *scored)
    missing = refusal(capsys, "evaluate", "--data", "memory://b/none")
    assert "memory://b/none/manifest.json: no such file. Prepare the data first" in missing


@pytest.mark.parametrize(
    "command",
    [
        "evaluate",
        "inspect FILE",
        "bench decode --latents 8 --checkpoint TINY",
        "train --preset tiny --steps 1 --output OUTPUT",
    ],
)
def test_every_command_that_reads_a_dataset_takes_its_address(command, capsys, midi_file, tiny_checkpoint, tmp_path):
    names = {"FILE": str(midi_file), "TINY": str(tiny_checkpoint), "OUTPUT": str(tmp_path / "run")}
    words = [names.get(word, word) for word in command.split()]
    assert "memory://b/data/manifest.json: no such file" in refusal(capsys, *words, "--data", "memory://b/data")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--output", "train --data d --steps 1 --output s3://b/run"),
        ("--report", "evaluate --data d --report gs://b/out"),
        ("--maestro", "prepare --maestro s3://b/m.zip --output d"),
    ],
)
def test_an_address_is_not_taken_for_a_folder_here(option, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *words.split())
    assert code == 2
    assert f"{option} must be on this machine, got an address: " in " ".join(errors.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s3:").mkdir()  # a folder may be called so
    Prepare(maestro=Path("s3:/m.zip"), output="d")
