"""The whole way in processes of its own: prepare, train, stop, resume, evaluate, generate, inspect; and the wheel."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from test_cli import refusal

ROOT = Path(__file__).parents[1]
MUSIC_AR = [sys.executable, "-m", "app.cli"]


def music_ar(*arguments, expect=0):
    """Standard output of `music-ar arguments`; fails unless it ends with `expect`, and never shows a traceback."""
    result = subprocess.run(
        [*MUSIC_AR, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if expect == 0 else result.stderr


@pytest.mark.parametrize(
    "command", [[], ["prepare"], ["evaluate"], ["generate"], ["render"], ["inspect"], ["web"]], ids=" ".join
)
def test_help_loads_no_jax_and_no_numpy(command):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *MUSIC_AR[1:], *command, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "app.console" in imported  # or else we read the report wrongly
    assert not imported & {"jax", "numpy", "flax"}
    assert "--help" in result.stdout


def test_closing_the_output_early_is_no_failure(midi_file):
    process = subprocess.Popen(
        [*MUSIC_AR, "inspect", str(midi_file), "--tokens"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_the_whole_way(midi_folder, tmp_path, capsys):
    data, run, piece = tmp_path / "data", tmp_path / "run", tmp_path / "piece.mid"
    train = ["train", "--data", data, "--output", run, "--preset", "tiny", "--batch-size", 2, "--log-every", 1]

    music_ar("prepare", "--midi", midi_folder, "--output", data)
    assert "nothing to resume" in music_ar(*train, "--steps", 3, "--resume", expect=2)
    stop_after_some_steps([*MUSIC_AR, *map(str, train), "--steps", "100000"], run / "log.jsonl", signal.SIGTERM)
    stopped_at = logged_steps(run)[-1]
    # What another process left is refused in this one: that starts nothing, so it need not wait for a new one.
    assert "resume it" in refusal(capsys, *train, "--steps", 100000)
    assert "steps was 100000, is 3" in refusal(capsys, *train, "--steps", 3, "--resume")
    assert "augmentation" in refusal(capsys, *train, "--steps", 100000, "--resume", "--no-augment")
    resumed = [*MUSIC_AR, *map(str, train), "--steps", "100000", "--resume"]
    stop_after_some_steps(resumed, run / "log.jsonl", signal.SIGINT)
    assert logged_steps(run) == list(range(1, logged_steps(run)[-1] + 1))
    assert logged_steps(run)[-1] > stopped_at

    run = tmp_path / "short run"
    music_ar(*train[:4], run, *train[5:], "--steps", 3)
    scores = music_ar("evaluate", "--data", data, "--split", "test", "--checkpoint", run / "model", "--stride", 32)
    assert "nats per token" in scores
    made = music_ar("generate", "--checkpoint", run / "model", "--output", piece, "--seconds", 5, "--seed", 7)
    assert "seed 7" in made
    assert "notes" in music_ar("inspect", piece)


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path, tiny_checkpoint):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [*MUSIC_AR, "generate", "--checkpoint", tiny_checkpoint, "--seconds", "1", "--seed", "1", "--output"]
    pieces, kept = [], []
    for name in ("first.mid", "second.mid"):
        subprocess.run([*command, tmp_path / name], cwd=ROOT, env=environment, capture_output=True, check=True)
        pieces.append((tmp_path / name).read_bytes())
        kept.append({path.name for path in (tmp_path / "music-ar").glob("jit__decode*-cache")})
    assert pieces[0] == pieces[1]
    assert len(kept[0]) == 1
    assert kept[1] == kept[0]


def stop_after_some_steps(command, log, number):
    """Starts training, and sends a signal once it has logged two steps more than before; it must end with 0."""
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


def test_an_installed_wheel_finds_its_model(unpacked_wheel, tmp_path):
    code = "import music_ar; music_ar.Generator.from_pretrained(); print(music_ar.__file__)"
    environment = os.environ | {"PYTHONPATH": str(unpacked_wheel), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(unpacked_wheel))
