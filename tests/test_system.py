"""From MIDI files to a generated piece; and what needs processes of its own: signals, pipes, caches and the wheel."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from test_cli import refusal, run

ROOT = Path(__file__).parents[1]
MUSIC_AR = [sys.executable, "-m", "app.cli"]


def music_ar(capsys, *arguments):
    """Standard output of `music-ar arguments`, in this process."""
    code, output, errors = run(capsys, *arguments)
    assert code == 0, errors
    return output


def test_closing_the_output_early_is_not_an_error(midi_file):
    process = subprocess.Popen(
        [*MUSIC_AR, "inspect", str(midi_file), "--tokens"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_training_stops_at_a_signal_and_resumes(prepared, tmp_path, capsys):
    folder, run = tmp_path / "run", ["--steps", 100000]
    train = ["train", "--data", prepared, "--output", folder, "--preset", "tiny", "--batch-size", 2, "--log-every", 1]
    stop_after_some_steps([*train, *run], folder / "log.jsonl", signal.SIGTERM)
    stopped_at = logged_steps(folder)[-1]
    assert "resume it" in refusal(capsys, *train, *run)
    assert "steps was 100000, is 3" in refusal(capsys, *train, "--steps", 3, "--resume")
    assert "augmentation" in refusal(capsys, *train, *run, "--resume", "--no-augment")
    stop_after_some_steps([*train, *run, "--resume"], folder / "log.jsonl", signal.SIGINT)
    assert logged_steps(folder) == list(range(1, logged_steps(folder)[-1] + 1))
    assert logged_steps(folder)[-1] > stopped_at


def test_the_whole_way(midi_folder, tmp_path, capsys):
    data, folder, piece = tmp_path / "data", tmp_path / "run", tmp_path / "piece.mid"
    train = ["train", "--data", data, "--output", folder, "--preset", "tiny", "--batch-size", 2, "--steps", 3]
    music_ar(capsys, "prepare", "--midi", midi_folder, "--output", data, "--workers", 1)
    assert "nothing to resume" in refusal(capsys, *train, "--resume")
    music_ar(capsys, *train)
    scores = music_ar(
        capsys, "evaluate", "--data", data, "--split", "test", "--checkpoint", folder / "model", "--stride", 32
    )
    assert "nats per token" in scores
    generated = music_ar(
        capsys, "generate", "--checkpoint", folder / "model", "--output", piece, "--seconds", 5, "--seed", 7
    )
    assert "seed 7" in generated
    assert "notes" in music_ar(capsys, "inspect", piece)


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_start(tmp_path, tiny_checkpoint):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "MUSIC_AR_CPU": "jax"}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [*MUSIC_AR, "generate", "--checkpoint", tiny_checkpoint, "--seconds", "1", "--seed", "1", "--output"]
    pieces, kept = [], []
    for name in ("first.mid", "second.mid"):
        subprocess.run([*command, tmp_path / name], cwd=ROOT, env=environment, capture_output=True, check=True)
        pieces.append((tmp_path / name).read_bytes())
        kept.append({path.name for path in (tmp_path / "music-ar").glob("*-cache")})
    assert pieces[0] == pieces[1]
    assert len(kept[0]) > 1
    assert kept[1] == kept[0]


def stop_after_some_steps(arguments, log, number):
    """Start training, and send a signal once it has logged two steps more than before; it must exit with 0."""
    command = [*MUSIC_AR, *map(str, arguments)]
    before = len(log.read_text().splitlines()) if log.exists() else 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < before + 2):
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "--resume" in output


def logged_steps(run):
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    """The wheel, built and unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_an_installed_wheel_finds_its_model(unpacked_wheel, tmp_path):
    code = "import music_ar; music_ar.Generator.from_pretrained(); print(music_ar.__file__)"
    environment = os.environ | {"PYTHONPATH": str(unpacked_wheel), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(unpacked_wheel))
