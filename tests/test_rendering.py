"""`music-ar render`: what it plans, writes and refuses, and that it goes on after any death."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_performance, noisy_model
from test_cli import refusal, run

from music_ar.midi.io import read_midi, write_midi
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_released

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that compiles fast."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_released(noisy_model(dataclasses.replace(PRESETS["tiny"], context=64, latents=16)), folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Three usable prompts, one in a folder of its own, and six that are damaged, each in its way."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "below").mkdir()
    for seed, name in enumerate(["a.mid", "b.midi", "below/a.mid"]):
        write_midi(make_performance(seed, notes=30), folder / name)
    whole = (folder / "a.mid").read_bytes()
    (folder / "bad empty.mid").write_bytes(b"")
    (folder / "bad text.mid").write_bytes(b"this is no MIDI file")
    (folder / "bad truncated.mid").write_bytes(whole[: len(whole) // 2])
    (folder / "bad header.mid").write_bytes(whole[:9])
    (folder / "bad silent.mid").write_bytes(bytes.fromhex("4d546864000000060000000103e84d54726b0000000400ff2f00"))
    (folder / "bad link.mid").symlink_to(folder / "nowhere.mid")
    return folder


def options(model, output, *more):
    return ["--checkpoint", model, "--output", output, "--seconds", 2, "--batch-size", 2, *more]


# Long enough to be killed in the middle of it, by a test that must wait for its turn on a busy machine.
WHOLE = ["--variations", 3, "--seconds", 10]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder):
    """All that is in an output folder, hidden files aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def rendered(model, prompts, tmp_path_factory):
    """An uninterrupted run, in a process of its own, with its exit code."""
    output = tmp_path_factory.mktemp("whole") / "out"
    result = process(prompts, *options(model, output, *WHOLE))
    _, errors = result.communicate(timeout=200)
    return output, result.returncode, errors


def process(*arguments, stdin=None, text=True):
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "render", *map(str, arguments)],
        cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text,
    )  # fmt: skip


def test_bad_prompts_cost_a_line_and_nothing_else(rendered):
    output, code, errors = rendered
    lines = lines_of(output)
    assert code == 3
    assert "Traceback" not in errors
    assert len(lines) == 9 * 3
    failed = [line for line in lines if line["status"] == "failed"]
    assert len({line["error"] for line in failed}) == 6
    assert all("bad" in line["prompt"] and line["sha256"] is None for line in failed)
    made = [line for line in lines if line["status"] == "made"]
    assert {line["file"] for line in made} == {f"{name}-v{v}.mid" for name in ("a", "b", "below/a") for v in (1, 2, 3)}
    for line in made:
        assert len(read_midi(output / line["file"])) > 0
        assert line["tokens"] > 0
        assert 0 < line["nats_per_token"] < 30
        assert line["settings"]["seconds"] == 10.0
    assert [line["seed"] for line in made if line["file"].startswith("b-")] == [0, 1, 2]
    assert not list(output.rglob(".part*"))


def test_killed_anywhere_the_same_command_gives_the_same_bytes(rendered, model, prompts, tmp_path):
    output = tmp_path / "out"
    arguments = [prompts, *options(model, output, *WHOLE)]
    for _ in range(2):
        killed, enough = process(*arguments), len(list(output.rglob("*.mid"))) + 2
        while killed.poll() is None and len(list(output.rglob("*.mid"))) < enough:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    made = len(list(output.rglob("*.mid")))
    assert 4 <= made < 9
    with (output / "manifest.jsonl").open("ab") as file:
        file.write(b'{"file": "torn')  # as a power cut leaves it
    resumed = process(*arguments)
    text, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 3, errors
    assert " were there" in text
    assert contents(output) == contents(rendered[0])


def test_two_processes_share_a_folder(rendered, model, prompts, tmp_path):
    output = tmp_path / "out"
    arguments = [prompts, *options(model, output, *WHOLE, "--log", "json")]
    both = [process(*arguments) for _ in range(2)]
    said = [[json.loads(line) for line in one.communicate(timeout=200)[0].splitlines()] for one in both]
    made = [event["file"] for events in said for event in events if event.get("status") == "made"]
    assert len(made) == len(set(made)) == 9
    run_again = process(*arguments)
    run_again.communicate(timeout=200)
    assert contents(output) == contents(rendered[0])


def test_ctrl_c_says_how_to_go_on(model, tmp_path):
    output = tmp_path / "out"
    stopped = process("--count", 50, *options(model, output, "--seconds", 20))
    while stopped.poll() is None and not (output / "manifest.jsonl").exists():
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "the same command makes the rest" in errors
    assert 1 <= len(lines_of(output)) < 50
    assert all((output / line["file"]).exists() for line in lines_of(output))


@pytest.fixture
def small(model, tmp_path):
    """Options of two short pieces, and where they go."""
    return tmp_path / "out", options(model, tmp_path / "out", "--count", 2)


def test_done_is_done_and_changed_settings_are_refused(capsys, small):
    output, arguments = small
    assert run(capsys, "render", *arguments)[0] == 0
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.mid")}
    code, text, _ = run(capsys, "render", *arguments)
    assert (code, contents(output)) == (0, before)
    assert "2 were there" in text
    assert times == {path: path.stat().st_mtime_ns for path in output.glob("*.mid")}
    refused = refusal(capsys, "render", *arguments, "--temperature", 0.5)
    assert "temperature was 1.0, is 0.5" in refused
    assert "--overwrite" in refused
    assert contents(output) == before
    (output / "piece-0001-v1.mid").unlink()
    assert run(capsys, "render", *arguments)[0] == 0
    assert contents(output) == before
    assert run(capsys, "render", *arguments, "--temperature", 0.5, "--overwrite")[0] == 0
    assert all(line["settings"]["temperature"] == 0.5 for line in lines_of(output))
    assert contents(output).keys() == before.keys()
    assert contents(output) != before


def test_a_dry_run_makes_nothing(capsys, small):
    output, arguments = small
    code, text, _ = run(capsys, "render", *arguments, "--dry-run")
    assert code == 0
    assert "2 of 2 pieces would be made: up to 0:04 of music" in text
    assert not output.exists()


def test_jobs_have_their_own_settings(capsys, model, prompts, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    shutil.copy(prompts / "a.mid", tmp_path / "a.mid")
    each = [
        {"prompt": "a.mid", "seconds": 1, "seed": 9, "variations": 2, "temperature": 0.8},
        {"name": "sub/own", "mode": "exact", "latents": 8},
    ]
    jobs.write_text("\n".join(map(json.dumps, each)))
    assert run(capsys, "render", "--jobs", jobs, *options(model, tmp_path / "out"))[0] == 0
    first, second, own = lines_of(tmp_path / "out")
    assert [line["file"] for line in (first, second, own)] == ["a-v1.mid", "a-v2.mid", "sub/own-v1.mid"]
    assert (first["seed"], second["seed"], own["seed"]) == (9, 10, 0)
    assert (first["settings"]["temperature"], own["settings"]["temperature"]) == (0.8, 1.0)
    assert (own["settings"]["mode"], own["settings"]["latents"]) == ("exact", 8)


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "a JSON object"), ('{"tempo": 3}', "tempo"), ('{"seed": "x"}', "seed must be a int"),
     ('{"name": "../x"}', "relative path"), ('{"temperature": -1}', "temperature")],
)  # fmt: skip
def test_a_broken_job_is_refused_before_the_work(capsys, model, tmp_path, line, said):
    (tmp_path / "jobs.jsonl").write_text(line)
    assert said in refusal(capsys, "render", "--jobs", tmp_path / "jobs.jsonl", *options(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "nothing to make"), (["nowhere.mid"], "no such file"), (["*.nothing"], "no file matches"),
     (["--count", "1", "--variations", "0"], "at least 1"), (["--count", "2", "--output", "-"], "one piece"),
     (["--count", "1", "--audio", "wav"], "--audio wav")],
)  # fmt: skip
def test_wrong_use(capsys, monkeypatch, model, tmp_path, arguments, said):
    monkeypatch.setitem(sys.modules, "music_ar.audio", None)  # as if it were not there
    output = [] if "--output" in arguments else ["--output", tmp_path / "out"]
    code, _, errors = run(capsys, "render", *arguments, *output, "--checkpoint", model)
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors


def test_lists_globs_and_names_that_meet(capsys, model, prompts, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text(f"# two of one name\n{prompts / 'a.mid'}\n\n{prompts / 'below/a.mid'}\n")
    arguments = [listed, prompts / "*.midi", *options(model, tmp_path / "out", "--seconds", 1)]
    assert run(capsys, "render", *arguments)[0] == 0
    assert [line["file"] for line in lines_of(tmp_path / "out")] == ["a-v1.mid", "a~2-v1.mid", "b-v1.mid"]


def test_a_real_folder_holds_odd_names(capsys, model, prompts, tmp_path):
    """A name that is no UTF-8, the longest that there may be, a folder and a pipe with a piece's ending."""
    folder = tmp_path / "odd"
    (folder / "folder.mid").mkdir(parents=True)
    os.mkfifo(folder / "pipe.mid")
    names = [os.fsdecode(b"\xe9tude.mid"), "n" * 251 + ".mid", "n" * 250 + "m.mid"]
    for name in names:
        shutil.copy(prompts / "a.mid", folder / name)
    arguments = [folder, *options(model, tmp_path / "out", "--seconds", 1)]
    assert run(capsys, "render", *arguments)[0] == 0
    lines = lines_of(tmp_path / "out")
    assert {Path(line["prompt"]).name for line in lines} == set(names)
    assert all((tmp_path / "out" / line["file"]).is_file() for line in lines)
    code, text, _ = run(capsys, "render", *arguments)
    assert (code, "3 were there" in text) == (0, True)
    assert run(capsys, "render", *arguments, "--overwrite", "--seed", 1, "--dry-run", "--log", "json")[0] == 0


def test_the_best_are_kept(capsys, model, prompts, tmp_path):
    arguments = [prompts / "a.mid", *options(model, tmp_path / "out", "--variations", 4, "--keep-best", 2)]
    assert run(capsys, "render", *arguments)[0] == 0
    lines = lines_of(tmp_path / "out")
    kept = [line for line in lines if line["status"] == "made"]
    assert [line["status"] for line in lines].count("dropped") == 2
    assert {path.name for path in (tmp_path / "out").glob("*.mid")} == {line["file"] for line in kept}
    assert min(line["score"] for line in kept) >= max(line["score"] for line in lines if line["status"] == "dropped")
    before = contents(tmp_path / "out")
    _, text, _ = run(capsys, "render", *arguments)
    assert "4 were there" in text
    assert contents(tmp_path / "out") == before


def test_fail_fast_stops(capsys, model, prompts, tmp_path):
    arguments = [prompts / "bad text.mid", "--count", 3, *options(model, tmp_path / "out", "--fail-fast")]
    code, _, errors = run(capsys, "render", *arguments)
    assert code == 3
    assert "bad text.mid" in errors
    assert len(lines_of(tmp_path / "out")) < 4


def test_it_pipes(model, prompts):
    piped = process(
        "-", "--output", "-", "--checkpoint", model, "--seconds", 2, stdin=subprocess.PIPE, text=False
    )  # fmt: skip
    data, errors = piped.communicate((prompts / "a.mid").read_bytes(), timeout=100)
    assert piped.returncode == 0, errors
    assert len(read_midi(io.BytesIO(data))) > 25


def test_an_output_that_cannot_be_written(capsys, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = refusal(capsys, "render", "--count", 1, "--output", tmp_path / "file", "--checkpoint", model)
    assert "cannot write in" in said


def test_a_full_disk_stops_it_and_keeps_what_is_done(capsys, monkeypatch, small):
    output, arguments = small
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 3:  # a piece, its line, and then no more
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, errors = run(capsys, "render", *arguments)
    assert code == 2
    assert "No space left on device" in errors
    assert "1 pieces were finished" in errors
    assert str(output / "piece-0002-v1.mid") in errors
    assert "the same command makes the rest" in errors
    monkeypatch.undo()
    assert len(lines_of(output)) == 1
    assert run(capsys, "render", *arguments)[0] == 0
    assert len(lines_of(output)) == 2


def test_audio_is_tagged(capsys, monkeypatch, small):
    """With a stand-in for the synthesiser: what it is asked for, and where its file goes."""
    import types

    output, arguments = small
    asked = []

    def write_audio(performance, file, *, format=None, title=None, comment=None):
        asked.append((len(performance) > 0, format, title, comment))
        file.write(b"sound")

    module = types.ModuleType("music_ar.audio")
    monkeypatch.setattr(module, "write_audio", write_audio, raising=False)
    monkeypatch.setitem(sys.modules, "music_ar.audio", module)
    assert run(capsys, "render", *arguments, "--audio", "flac")[0] == 0
    assert sorted(path.name for path in output.glob("*.flac")) == ["piece-0001-v1.flac", "piece-0002-v1.flac"]
    assert asked[0] == (True, "flac", "piece-0001-v1", "Music AR, model tiny, seed 0")
    assert lines_of(output)[0]["audio"] == "piece-0001-v1.flac"
