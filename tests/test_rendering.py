"""`music-ar render`: what it plans, writes and refuses, and that it continues after every kind of death."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from conftest import make_performance
from test_cli import refusal, run

from app import cli
from app.rendering import run as running
from app.rendering.leases import Leases
from music_ar.decoding.autotune import Autotuner
from music_ar.embedding import PieceEmbedder, library
from music_ar.embedding.search import likeness
from music_ar.metrics.statistics import plausibility
from music_ar.midi import read_midi, write_midi
from music_ar.tokens.codec import encode

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Three usable prompts, one of them in a subfolder, and six that are damaged in different ways."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "below").mkdir()
    for seed, name in enumerate(["a.mid", "b.midi", "below/a.mid"]):
        write_midi(make_performance(seed, notes=30), folder / name)
    whole = (folder / "a.mid").read_bytes()
    (folder / "bad empty.mid").write_bytes(b"")
    (folder / "bad text.mid").write_bytes(b"this is not a MIDI file")
    (folder / "bad truncated.mid").write_bytes(whole[: len(whole) // 2])
    (folder / "bad header.mid").write_bytes(whole[:9])
    (folder / "bad silent.mid").write_bytes(bytes.fromhex("4d546864000000060000000103e84d54726b0000000400ff2f00"))
    (folder / "bad link.mid").symlink_to(folder / "nowhere.mid")
    return folder


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    """Options of a quick run."""
    return ["--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", "--seconds", 2, "--batch-size", 2]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


# Long enough to be killed in the middle.
LONG = ["--variations", 3, "--seconds", 10]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder):
    """All files of an output folder, except hidden ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def rendered(tiny_checkpoint, prompts, tmp_path_factory):
    """An uninterrupted run: its folder, exit code and errors."""
    output, errors = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    arguments = ["render", prompts, "--checkpoint", tiny_checkpoint, "--output", output, "--batch-size", 2, *LONG]
    with contextlib.redirect_stderr(errors):
        code = cli.main([str(argument) for argument in arguments])
    return output, code, errors.getvalue()


def process(*arguments, stdin=None, text=True):
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "render", *map(str, arguments)],
        cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text,
    )  # fmt: skip


def wait_for_pieces(started, folder, count):
    while started.poll() is None and len(list(folder.rglob("*.mid"))) < count:
        time.sleep(0.01)


def test_damaged_prompts_fail_alone(rendered):
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


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(capsys, rendered, options, output, prompts):
    arguments = [prompts, *options, *LONG]
    for _ in range(2):
        killed, enough = process(*arguments), len(list(output.rglob("*.mid"))) + 2
        wait_for_pieces(killed, output, enough)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert 4 <= len(list(output.rglob("*.mid"))) < 9
    with (output / "manifest.jsonl").open("ab") as file:
        file.write(b'{"file": "torn')  # as a power cut leaves it
    code, text, errors = run(capsys, "render", *arguments)
    assert code == 3, errors
    [complete] = re.findall(r"(\d+) already complete", text)
    assert int(complete) >= 2  # each kill may cost a piece that had no line yet
    assert contents(output) == contents(rendered[0])


@pytest.mark.slow
def test_two_processes_share_a_folder(capsys, rendered, options, output, prompts):
    arguments = [prompts, *options, *LONG, "--log", "json"]
    other = process(*arguments)
    wait_for_pieces(other, output, 1)
    code, text, _ = run(capsys, "render", *arguments)
    other_text, _ = other.communicate(timeout=200)
    events = [json.loads(line) for line in (text + other_text).splitlines()]
    generated = [event["file"] for event in events if event.get("status") == "made"]
    assert len(generated) == len(set(generated)) == 9
    assert code in (0, 3)  # the damaged prompts fail in either process
    run(capsys, "render", *arguments)
    assert contents(output) == contents(rendered[0])


def test_a_lease_has_one_holder_and_ends_with_its_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from app.rendering.leases import Leases\n"
        "leases = Leases(Path(sys.argv[1])); print(leases.acquire('a.mid'), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with Leases(tmp_path) as leases, Leases(tmp_path) as others:
            assert not leases.acquire("a.mid")
            assert leases.acquire("b.mid")
            assert not others.acquire("b.mid")
            leases.release("b.mid")
            assert others.acquire("b.mid")
            holder.kill()
            holder.wait()
            assert leases.acquire("a.mid")
    with Leases(tmp_path) as leases:
        assert leases.acquire("a.mid")
        assert leases.acquire("b.mid")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_continue(capsys, monkeypatch, options, output, number):
    finished = []

    def interrupted(*arguments):
        if finished:
            signal.raise_signal(number)
        finished.append(arguments)
        return plausibility(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running, "plausibility", interrupted)
        code, _, errors = run(capsys, "render", "--count", 5, *options)
    assert code == 130
    assert "1 pieces are finished" in errors
    assert "run the same command to continue" in errors
    assert len(lines_of(output)) == 1
    code, text, _ = run(capsys, "render", "--count", 5, *options)
    assert code == 0
    assert "4 pieces generated" in text
    assert len(lines_of(output)) == 5


def test_complete_pieces_stay_and_changed_settings_are_refused(capsys, options, output):
    arguments = ["--count", 2, *options]
    assert run(capsys, "render", *arguments)[0] == 0
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.mid")}
    code, text, _ = run(capsys, "render", *arguments)
    assert (code, contents(output)) == (0, before)
    assert "2 already complete" in text
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


def test_a_folder_of_version_0_1_continues(capsys, options, output):
    """Its manifest has the window mode, an option that is gone, and not the sampling options that came later."""
    arguments = ["--count", 2, *options]
    assert run(capsys, "render", *arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.mid")}

    def set_mode(mode):
        lines = [line | {"settings": line["settings"] | {"mode": mode}} for line in lines_of(output)]
        for line in lines:
            line["settings"] = {name: value for name, value in line["settings"].items() if not name.endswith("_pitch")}
        (output / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    set_mode("sliding")
    code, text, _ = run(capsys, "render", *arguments)
    assert code == 0
    assert "2 already complete" in text
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("*.mid")}
    assert "lowest_pitch was 0, is 21" in refusal(capsys, "render", *arguments, "--lowest-pitch", 21)
    set_mode("exact")
    assert "mode was exact, is None" in refusal(capsys, "render", *arguments)


@pytest.fixture
def measured(monkeypatch):
    """A machine whose step takes half a second."""
    monkeypatch.setattr(Autotuner, "seconds_per_token", lambda *_, **__: 0.5)


@pytest.mark.usefixtures("measured")
def test_a_dry_run_generates_nothing(capsys, options, output):
    code, text, _ = run(capsys, "render", "--count", 2, *options, "--dry-run")
    assert code == 0
    # 40 tokens per second of music, two pieces at once.
    assert "2 of 2 pieces would be generated, up to 0:04 of music in about 0:40" in text
    assert not output.exists()


WHOLE_LINE = {
    "file": "a.mid", "prompt_sha256": None, "seed": 0, "settings": {}, "model": {}, "score": None, "status": "failed",
    "sha256": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[1]", b'{"seed": 1}', b"", b"[" * 100_000, b"\xff", b"NaN",
     *(json.dumps(WHOLE_LINE | change).encode() for change in (
         {"seed": "1"}, {"file": "../b.mid"}, {"audio": "../../b.mp3"}, {"settings": None}, {"score": "high"},
     ))],
    ids=range(12),
)  # fmt: skip
def test_a_damaged_manifest_is_refused(capsys, options, output, damage):
    output.mkdir()
    (output / "manifest.jsonl").write_bytes(json.dumps(WHOLE_LINE).encode() + b"\n" + damage + b"\n")
    assert "manifest.jsonl:2 is not a record of a piece" in refusal(capsys, "render", "--count", 1, *options)


def test_jobs_have_their_own_settings(capsys, options, output, prompts, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    shutil.copy(prompts / "a.mid", tmp_path / "a.mid")
    each = [
        {"prompt": "a.mid", "seconds": 1, "seed": 9, "variations": 2, "temperature": 0.8, "prompt_seconds": 2},
        {"name": "sub/own", "latents": 8, "top_k": 5, "continuation_only": True},
        {"prompt": "a.mid"},
    ]
    jobs.write_text("\n".join(map(json.dumps, each)))
    assert run(capsys, "render", "--jobs", jobs, *options, "--min-p", 0.1, "--prompt-seconds", 3)[0] == 0
    lines = lines_of(output)
    assert [line["file"] for line in lines] == ["a-v1.mid", "a-v2.mid", "sub/own-v1.mid", "a~2-v1.mid"]
    assert [line["seed"] for line in lines] == [9, 10, 0, 0]
    own = {"seconds": 2.0, "prompt_seconds": 3.0, "temperature": 1.0, "top_k": 0, "min_p": 0.1, "batch_size": 2}
    changes = [
        {"seconds": 1.0, "temperature": 0.8, "prompt_seconds": 2.0},
        {"seconds": 1.0, "temperature": 0.8, "prompt_seconds": 2.0},
        {"latents": 8, "top_k": 5, "continuation_only": True},
        {"continuation_only": False},
    ]
    for line, changed in zip(lines, changes, strict=True):
        assert (own | changed).items() <= line["settings"].items()


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "a JSON object"), ('{"tempo": 3}', "tempo"), ('{"mode": "exact"}', "mode"),
     ('{"seed": "x"}', "seed must be a whole number"), ('{"seconds": true}', "seconds must be a number"),
     ('{"latents": "auto"}', "latents must be a whole number"), ('{"latents": 1}', "latents must be in 2"),
     ('{"latents": 100000}', "latents must be in 2"), ('{"variations": 0}', "variations must be a whole number from 1"),
     ('{"prompt": "\\ud800.mid"}', "whole Unicode characters"), ('{"name": "a\\udfff"}', "whole Unicode characters"),
     ('{"seconds": NaN}', "seconds must be a number above 0 and at most 86400, got nan"),
     ('{"seconds": 3e7}', "at most 86400, got 30000000"), ('{"seconds": 1' + "0" * 400 + "}", "a number of 401 digits"),
     ('{"top_k": 1099511627776}', "top_k must be a whole number from 0 to 1000, got 1099511627776"),
     ('{"seed": ' + "9" * 5000 + "}", "expected a JSON object"), ("[" * 100_000, "expected a JSON object"),
     ('{"temperature": -Infinity}', "temperature must be a number from 0 to 100, got -inf"),
     ('{"variations": 1e3}', "variations must be a whole number, got 1000"),
     ('{"continuation_only": 1}', "continuation_only must be true or false, got 1"),
     ('{"temperature": -1}', "temperature")],
)  # fmt: skip
def test_a_wrong_job_is_refused_before_the_work(capsys, options, output, tmp_path, line, said):
    (tmp_path / "jobs.jsonl").write_text(line)
    assert said in refusal(capsys, "render", "--jobs", tmp_path / "jobs.jsonl", *options)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "nothing to generate"), (["nowhere.mid"], "no such file"), (["*.nothing"], "no file matches"),
     (["--count", 1, "--variations", 0], "variations must be a whole number from 1 to 10000, got 0"),
     (["--count", 1, "--batch-size", 0], "--batch-size must be a whole number from 1 to 4096, got 0"),
     (["--count", 1, "--seconds", 0], "seconds must be a number above 0 and at most 86400, got 0"),
     (["--count", 2, "--output", "-"], "single piece"), (["--count", 1, "--output", "-", "--dry-run"], "--dry-run")],
)  # fmt: skip
def test_wrong_usage(capsys, tiny_checkpoint, tmp_path, arguments, said):
    output = [] if "--output" in arguments else ["--output", tmp_path / "out"]
    code, _, errors = run(capsys, "render", *arguments, *output, "--checkpoint", tiny_checkpoint)
    assert code == 2
    assert said in " ".join(errors.split())
    assert "Traceback" not in errors


def test_audio_without_its_extra_is_refused_before_the_work(capsys, monkeypatch, options, output):
    for name in ("music_ar.audio", "music_ar.audio.synthesis"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as if it were not installed
    said = refusal(capsys, "render", "--count", 1, "--audio", "mp3", *options)
    assert "pip install '.[audio]'" in said
    assert not output.exists()


def test_lists_globs_and_equal_names(capsys, options, output, prompts, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text(f"# two of one name\n{prompts / 'a.mid'}\n\n{prompts / 'below/a.mid'}\n")
    assert run(capsys, "render", listed, prompts / "*.midi", *options, "--seconds", 1)[0] == 0
    assert [line["file"] for line in lines_of(output)] == ["a-v1.mid", "a~2-v1.mid", "b-v1.mid"]


@pytest.mark.skipif(sys.platform == "win32", reason="such names and pipes do not exist")
@pytest.mark.usefixtures("measured")
def test_odd_names_in_a_real_folder(capsys, options, output, prompts, tmp_path):
    """A name that is not Unicode, the longest possible ones, a folder and a pipe with the ending of a MIDI file."""
    folder = tmp_path / "odd"
    (folder / "folder.mid").mkdir(parents=True)
    os.mkfifo(folder / "pipe.mid")
    names = [os.fsdecode(b"\xe9tude.mid"), "n" * 251 + ".mid", "n" * 250 + "m.mid"]
    for name in names:
        shutil.copy(prompts / "a.mid", folder / name)
    arguments = [folder, *options, "--seconds", 1]
    code, _, errors = run(capsys, "render", *arguments)
    assert code == 3
    assert "pipe.mid: the prompt cannot be read: it is a pipe, not a file" in errors
    made = [line for line in lines_of(output) if line["status"] == "made"]
    assert {Path(line["prompt"]).name for line in made} == set(names)
    assert all((output / line["file"]).is_file() for line in made)
    code, text, _ = run(capsys, "render", *arguments)
    assert (code, "3 already complete, 1 failed" in text) == (3, True)
    assert run(capsys, "render", *arguments, "--overwrite", "--seed", 1, "--dry-run", "--log", "json")[0] == 0


@pytest.mark.parametrize("encoder_ships", [True, False])
def test_the_best_are_kept(capsys, monkeypatch, options, output, prompts, encoder_ships):
    """Those most like the prompt or, without an encoder, the most plausible."""
    if not encoder_ships:
        monkeypatch.setattr(library, "SHIPPED_FOLDERS", ())
    arguments = [prompts / "a.mid", *options, "--variations", 4, "--keep-best", 2, "--continuation-only"]
    assert run(capsys, "render", *arguments)[0] == 0
    lines = lines_of(output)
    scores = {status: [line["score"] for line in lines if line["status"] == status] for status in ("made", "dropped")}
    assert len(scores["made"]) == len(scores["dropped"]) == 2
    assert min(scores["made"]) > max(scores["dropped"])
    kept = {line["file"]: line for line in lines if line["status"] == "made"}
    assert {path.name for path in output.glob("*.mid")} == kept.keys()
    prompt, encoder = read_midi(prompts / "a.mid"), PieceEmbedder.from_pretrained("maestro-encoder")
    for file, line in kept.items():
        piece = read_midi(output / file)
        score = likeness(encoder, prompt, piece) if encoder_ships else plausibility(piece, line["nats_per_token"])
        assert line["score"] == pytest.approx(score, rel=0.01)
        assert line["settings"].get("ranked_by") == ("likeness" if encoder_ships else None)
    before = contents(output)
    _, text, _ = run(capsys, "render", *arguments)
    assert "4 already complete" in text
    assert contents(output) == before


def test_a_failed_piece_is_retried(capsys, options, output, prompts, tmp_path):
    prompt = tmp_path / "prompt.mid"
    prompt.write_bytes(b"not yet a MIDI file")
    for _ in range(2):
        code, text, _ = run(capsys, "render", prompt, *options)
        assert code == 3
        assert "0 already complete, 1 failed" in text
    assert not list(output.glob("*.mid"))
    shutil.copy(prompts / "a.mid", prompt)
    code, text, _ = run(capsys, "render", prompt, *options)
    assert code == 0
    assert "1 pieces generated" in text


def test_fail_fast_stops_at_the_first_failure(capsys, options, output, prompts):
    code, _, errors = run(capsys, "render", prompts / "bad text.mid", "--count", 3, *options, "--fail-fast")
    assert code == 3
    assert "bad text.mid" in errors
    assert len(lines_of(output)) < 4


@pytest.mark.slow
def test_it_pipes(tiny_checkpoint, prompts):
    piped = process(
        "-", "--output", "-", "--checkpoint", tiny_checkpoint, "--seconds", 2, stdin=subprocess.PIPE, text=False
    )  # fmt: skip
    data, errors = piped.communicate((prompts / "a.mid").read_bytes(), timeout=100)
    assert piped.returncode == 0, errors
    assert len(read_midi(data)) > 25


def test_an_output_that_cannot_be_written(capsys, tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = refusal(capsys, "render", "--count", 1, "--output", tmp_path / "file", "--checkpoint", tiny_checkpoint)
    assert "cannot write in" in said


def test_a_full_disk_stops_it_and_keeps_what_is_finished(capsys, monkeypatch, options, output):
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 3:  # after a piece and its line
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        code, _, errors = run(capsys, "render", "--count", 2, *options)
    assert code == 2
    assert "No space left on device" in errors
    assert "1 pieces are finished" in errors
    assert str(output / "piece-0002-v1.mid") in errors
    assert "run the same command to continue" in errors
    assert len(lines_of(output)) == 1
    assert run(capsys, "render", "--count", 2, *options)[0] == 0
    assert len(lines_of(output)) == 2


def test_the_pedal_is_written_if_asked_for(capsys, options, output):
    """It is one of the settings, and changes how the same notes are written."""
    arguments = ["render", "--count", 1, *options]
    assert run(capsys, *arguments)[0] == 0
    plain = (output / "piece-0001-v1.mid").read_bytes()
    assert "pedal was None, is True" in refusal(capsys, *arguments, "--pedal")
    assert run(capsys, *arguments, "--pedal", "--overwrite")[0] == 0
    with_pedal = (output / "piece-0001-v1.mid").read_bytes()
    assert with_pedal != plain
    assert encode(read_midi(with_pedal)).tolist() == encode(read_midi(plain)).tolist()
    assert lines_of(output)[0]["settings"]["pedal"] is True


def test_audio_files_are_written_beside_the_pieces_and_tagged(capsys, options, output):
    arguments = ["--count", 2, *options, "--audio", "flac"]
    assert run(capsys, "render", *arguments)[0] == 0
    assert sorted(path.name for path in output.glob("*.flac")) == ["piece-0001-v1.flac", "piece-0002-v1.flac"]
    assert lines_of(output)[0]["audio"] == "piece-0001-v1.flac"
    with soundfile.SoundFile(output / "piece-0001-v1.flac") as file:
        assert file.title == "piece-0001-v1"
        assert "Music AR, model tiny, seed 0" in file.comment
    (output / "piece-0001-v1.flac").unlink()
    _, text, _ = run(capsys, "render", *arguments)
    assert "1 pieces generated" in text
    assert (output / "piece-0001-v1.flac").exists()
