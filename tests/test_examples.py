"""The examples run, with the tiny model."""

import os
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_rendering import contents, lines_of

from music_ar.midi.io import read_midi

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example in this process, and returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_continue_a_file(example, tiny_checkpoint, midi_file, tmp_path):
    longer = tmp_path / "longer.mid"
    printed = example("continue_a_file.py", midi_file, longer, "--seconds", 2, "--checkpoint", tiny_checkpoint)
    assert printed.count("nats per token") == 3
    assert len(read_midi(longer)) > 0


def test_an_album(example, tiny_checkpoint, tmp_path):
    example("album.py", tmp_path, "--pieces", 3, "--seconds", 2, "--checkpoint", tiny_checkpoint)
    pieces, sounds = sorted(tmp_path.glob("*.mid")), sorted(tmp_path.glob("*.wav"))
    assert [path.stem for path in pieces] == [path.stem for path in sounds] == ["01", "02", "03"]
    assert len({path.read_bytes() for path in pieces}) == 3
    assert (tmp_path / "cover.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def slurm(tmp_path):
    """Starts a script as Slurm would, on this machine."""
    commands = tmp_path / "commands"
    commands.mkdir()
    python = shlex.quote(sys.executable)
    for name, line in {
        "music-ar": f'exec {python} -m app.cli "$@"',
        "ray": f'exec {python} -m ray.scripts.scripts "$@"',
        "scontrol": "echo 127.0.0.1",
        "srun": 'exec "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        "PATH": os.pathsep.join([str(commands), os.environ["PATH"]]),
        "PYTHONPATH": str(EXAMPLES.parent),
        "RAY_PORT": str(port),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
    }

    def start(name, *arguments):
        words = ["sh", str(EXAMPLES / name), *map(str, arguments)]
        return subprocess.Popen(
            words, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
def test_render_on_many_machines(slurm, tiny_checkpoint, tmp_path):
    """Two tasks of an array share a folder; Ray makes the same."""
    options = ["--count", 6, "--seconds", 5, "--batch-size", 2, "--checkpoint", tiny_checkpoint]
    tasks = [slurm("render_array.sh", *options, "--output", tmp_path / "array") for _ in range(2)]
    for task in tasks:
        printed, _ = task.communicate(timeout=200)
        assert task.returncode == 0, printed
    assert len(lines_of(tmp_path / "array")) == 6
    pytest.importorskip("ray")
    job = slurm("render_on_ray.sh", *options, "--output", tmp_path / "ray")
    printed, _ = job.communicate(timeout=200)
    assert job.returncode == 0, printed
    assert contents(tmp_path / "ray") == contents(tmp_path / "array")
