"""The examples run, with the tiny model."""

import runpy
import sys
from pathlib import Path

import pytest

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
