"""The examples run, with the tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from music_ar.midi.io import read_midi

ROOT = Path(__file__).parents[1]


def example(name, *arguments):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        cwd=ROOT, env=None, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The packages are found as they are when installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_continue_a_file(tiny_checkpoint, midi_file, tmp_path):
    longer = tmp_path / "longer.mid"
    said = example("continue_a_file.py", midi_file, longer, "--seconds", 2, "--checkpoint", tiny_checkpoint)
    assert said.count("nats a token") == 3
    assert len(read_midi(longer)) > 0


def test_an_album(tiny_checkpoint, tmp_path):
    example("album.py", tmp_path, "--pieces", 3, "--seconds", 2, "--checkpoint", tiny_checkpoint)
    assert len(list(tmp_path.glob("*.mid"))) == 3
    assert (tmp_path / "cover.png").read_bytes().startswith(b"\x89PNG")


def test_the_web_example_explains_itself():
    pytest.importorskip("gradio_client")
    assert "http://127.0.0.1" in example("web_api.py", "--help")
