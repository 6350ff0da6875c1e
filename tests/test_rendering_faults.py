"""`music-ar render` with wrong jobs, prompts and names: each costs its line, and nothing waits or ends the run.

A made-up generator stands for the model, so that a run takes no time.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import make_performance
from test_cli import refusal, run

from music_ar.decoding.request import GenerationError
from music_ar.generator import Generator, Piece
from music_ar.midi import MidiError, write_midi
from music_ar.midi.io import MAX_BYTES
from music_ar.midi.performance import Performance

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes and devices")


class Quick:
    """Instead of a `Generator`: a piece is random notes by its seed.

    Attributes:
        used: the prompts as they were given.
        before: called before each request is taken.
    """

    config = SimpleNamespace(latents=32, most_latents=32, wishes=None)

    def __init__(self):
        self.used, self.before = [], lambda: None

    def batch_size(self, _latents):
        return 2

    def generate_many(self, requests, *, batch_size, progress):
        del batch_size, progress
        for request in requests:
            self.used.append(request.prompt)
            try:
                request.read().prompt_tokens()
            except (GenerationError, MidiError) as error:
                nothing = Performance.empty()
                yield Piece(request=request, performance=nothing, continuation=nothing, tokens=0,
                            nats_per_token=math.nan, error=str(error))  # fmt: skip
            else:
                music = make_performance(request.seed, notes=20)
                yield Piece(request=request, performance=music, continuation=music, tokens=9, nats_per_token=1.0)
            self.before()


@pytest.fixture(autouse=True)
def generator(monkeypatch):
    quick = Quick()
    monkeypatch.setattr(Generator, "from_pretrained", lambda _: quick)
    return quick


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def prompt(tmp_path):
    write_midi(make_performance(0, notes=30), tmp_path / "a.mid")
    return tmp_path / "a.mid"


def lines_of(output):
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().split("\n")[:-1]]


def render_jobs(capsys, tmp_path, output, jobs):
    """Runs jobs, given as objects or as their text; returns exit code, errors and lines of the manifest."""
    texts = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    (tmp_path / "jobs.jsonl").write_text("\n".join(texts))
    code, _, errors = run(capsys, "render", "--jobs", tmp_path / "jobs.jsonl", "--output", output)
    return code, errors, lines_of(output)


@pytest.mark.parametrize(
    ("name", "said"),
    [("../x", "without .."), ("a/../../x", "without .."), ("/tmp/x", "relative path"), ("", "relative path"),
     (" ", "relative path"), ("a\nb", "control characters"), ("a\0b", "relative path"), ("..", "without .."),
     ("/".join(["x" * 100] * 20), "at most 1000 bytes")],
)  # fmt: skip
def test_a_name_that_cannot_be_costs_its_line(capsys, tmp_path, output, name, said):
    code, errors, lines = render_jobs(capsys, tmp_path, output, [{"name": "before"}, {"name": name}, {"name": "after"}])
    assert code == 3
    assert said in errors
    assert [line["status"] for line in lines] == ["made", "failed", "made"]
    assert said in lines[1]["error"]
    assert len(list(output.rglob("*.mid"))) == 2


def test_long_names_are_cut_and_equal_ones_numbered(capsys, tmp_path, output):
    names = ["x" * 300, "x" * 301, "é" * 150 + "/" + "ü" * 150, "caf\u00e9", "cafe\u0301", "CAFÉ", "Straße", "STRASSE"]
    code, errors, lines = render_jobs(capsys, tmp_path, output, [{"name": name} for name in names])
    assert code == 0, errors
    files = [line["file"] for line in lines]
    assert files[:2] == ["x" * 200 + "-v1.mid", "x" * 200 + "~2-v1.mid"]
    assert files[2] == "é" * 100 + "/" + "ü" * 100 + "-v1.mid"
    assert files[3:] == ["café-v1.mid", "cafe\u0301~2-v1.mid", "CAFÉ~3-v1.mid", "Straße-v1.mid", "STRASSE~2-v1.mid"]
    assert all((output / file).is_file() for file in files)


def odd_prompts(folder):
    """Files with the ending of a MIDI file that are none: name -> why."""
    os.mkfifo(folder / "pipe.mid")
    (folder / "device.mid").symlink_to("/dev/zero")
    (folder / "nowhere.mid").symlink_to(folder / "nowhere")
    (folder / "loop.mid").symlink_to(folder / "loop.mid")
    with (folder / "large.mid").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    (folder / "text.mid").write_text("not MIDI")
    (folder / "empty.mid").touch()
    return {
        "device.mid": "it is a device, not a file",
        "empty.mid": "",
        "large.mid": "it has more than 16 MB",
        "loop.mid": "Too many levels of symbolic links",
        "nowhere.mid": "No such file or directory",
        "pipe.mid": "it is a pipe, not a file",
        "text.mid": "",
    }


@pytest.mark.parametrize("way", ["folder", "files", "list", "glob", "jobs"])
def test_a_prompt_that_is_no_file_costs_its_line(capsys, tmp_path, output, prompt, way):
    folder = tmp_path / "prompts"
    folder.mkdir()
    shutil.copy(prompt, folder / "good.mid")
    reasons = odd_prompts(folder)
    (folder / "folder.mid").mkdir()
    names = [*reasons, "good.mid"]
    if way == "list":
        (tmp_path / "list.txt").write_text("\n".join(f"prompts/{name}" for name in names))
    if way == "jobs":
        (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps({"prompt": f"prompts/{name}"}) for name in names))
    arguments = {
        "folder": [folder],
        "files": [folder / name for name in names],
        "list": [tmp_path / "list.txt"],
        "glob": [folder / "*.mid"],
        "jobs": ["--jobs", tmp_path / "jobs.jsonl"],
    }
    code, _, errors = run(capsys, "render", *arguments[way], "--output", output)
    assert code == 3
    lines = {os.path.basename(line["prompt"]): line for line in lines_of(output)}  # noqa: PTH119
    assert lines.keys() == set(names)
    assert lines["good.mid"]["status"] == "made"
    for name, reason in reasons.items():
        assert lines[name]["status"] == "failed"
        assert reason in lines[name]["error"]
        assert name in errors


def test_a_folder_as_a_prompt_of_a_job_costs_its_line(capsys, tmp_path, output):
    code, errors, _ = render_jobs(capsys, tmp_path, output, [{"prompt": "."}, {"prompt": "x" * 5000}, {"name": "good"}])
    assert code == 3
    assert "it is a folder, not a file" in errors
    assert "File name too long" in errors
    assert [line["status"] for line in lines_of(output)].count("made") == 1


def test_the_hash_is_of_the_bytes_that_were_used(capsys, tmp_path, output, prompt, generator):
    """The second prompt changes after it was planned, and again after it was read."""
    second = tmp_path / "b.mid"
    shutil.copy(prompt, second)
    numbers = iter(range(1, 10))
    generator.before = lambda: write_midi(make_performance(next(numbers), notes=30), second)
    assert run(capsys, "render", prompt, second, "--output", output)[0] == 0
    lines = lines_of(output)
    assert all(isinstance(used, bytes) for used in generator.used)
    assert [line["prompt_sha256"] for line in lines] == [hashlib.sha256(used).hexdigest() for used in generator.used]
    assert lines[0]["prompt_sha256"] != lines[1]["prompt_sha256"]
    assert second.read_bytes() != generator.used[1]


def test_a_piece_whose_prompt_is_gone_stays_complete(capsys, output, prompt):
    assert run(capsys, "render", prompt, prompt.parent / "*.mid", "--output", output)[0] == 0
    before = prompt.read_bytes()
    prompt.unlink()
    prompt.symlink_to("nowhere")
    code, text, _ = run(capsys, "render", prompt, prompt.parent / "*.mid", "--output", output)
    assert (code, "2 already complete, 0 failed" in text) == (0, True)
    prompt.unlink()
    prompt.write_bytes(before + b"\0")
    assert "prompt_sha256 was" in refusal(capsys, "render", prompt, "--output", output)


def test_a_hyphen_is_standard_input_on_the_command_line_and_a_name_elsewhere(
    capsys, tmp_path, output, prompt, monkeypatch, generator
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(prompt, "-")
    (tmp_path / "list.txt").write_text("-\n")
    code, errors, _ = render_jobs(capsys, tmp_path, output, [{"prompt": "-"}])
    assert code == 0, errors
    assert run(capsys, "render", "list.txt", "--jobs", "jobs.jsonl", "--output", "other")[0] == 0
    assert generator.used == [prompt.read_bytes()] * 3
    write_midi(make_performance(5, notes=30), tmp_path / "b.mid")
    with (tmp_path / "b.mid").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(capsys, "render", "-", "--output", "third")[0] == 0
    assert generator.used[-1] == (tmp_path / "b.mid").read_bytes()
    with (tmp_path / "jobs.jsonl").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(capsys, "render", "--jobs", "-", "--output", "fourth")[0] == 0
    assert generator.used[-1] == prompt.read_bytes()


def test_jobs_end_with_a_line_feed_alone(capsys, tmp_path, output):
    names = ["a\u2028b", "c\u2029d", "e\u00a0f", "g"]
    texts = [json.dumps({"name": name}, ensure_ascii=False) for name in names]
    jobs = [texts[0], "", texts[1] + "\r", "  ", texts[2], "\ufeff".strip("\ufeff") + texts[3], ""]
    code, errors, lines = render_jobs(capsys, tmp_path, output, jobs)
    assert code == 0, errors
    assert [line["file"] for line in lines] == [f"{name}-v1.mid" for name in names]


def test_a_folder_where_a_piece_should_be_costs_its_line(capsys, tmp_path, output):
    (output / "b-v1.mid" / "something").mkdir(parents=True)
    (output / "c").mkdir()
    (output / "c" / "d").touch()
    names = ["a", "b", "c/d/e", "f", "a-v1.mid/g"]
    code, _, lines = render_jobs(capsys, tmp_path, output, [{"name": name} for name in names])
    assert code == 3
    assert [line["status"] for line in lines] == ["made", "failed", "failed", "made", "failed"]
    assert all("cannot be written" in line["error"] for line in lines if line["error"])


def test_a_read_only_folder_is_refused_before_the_work(capsys, output, generator, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(output))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert "Permission denied; choose another folder" in refusal(capsys, "render", "--count", 2, "--output", output)
    assert generator.used == []
