"""`music-ar inspect` on folders, several files, pipes and standard input."""

import io
import os
import sys
import threading

import numpy as np
import pytest

from app import cli
from music_ar.midi import Performance, write_midi


def piece(notes: int) -> Performance:
    onset_s = np.arange(notes) / 2
    return Performance(onset_s=onset_s, offset_s=onset_s + 1, pitch=60 + np.arange(notes), velocity=np.full(notes, 70))


@pytest.fixture
def folder(tmp_path):
    """Three usable files, one of them below a subfolder, and what is none of our business."""
    music = tmp_path / "music"
    (music / "below").mkdir(parents=True)
    for notes, name in enumerate(["A.MID", "below/b.kar", "c.RMI"], start=2):
        write_midi(piece(notes), music / name)
    for name in ["._A.MID", ".hidden.mid", "words.txt", "below/._b.kar"]:
        (music / name).write_bytes(b"no music")
    return music


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `music-ar inspect arguments`."""
    try:
        code = cli.main(["inspect", *map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def listed(output: str) -> dict[str, list[str]]:
    """File name -> columns before it."""
    lines = [line.split() for line in output.splitlines()[1:] if line[0] == " "]
    return {line[-1]: line[:-1] for line in lines}


def test_a_folder_has_a_line_for_each_midi_file(capsys, folder):
    code, output, errors = run(capsys, folder)
    assert (code, errors) == (0, "")
    assert list(listed(output)) == [str(folder / name) for name in ("A.MID", "below/b.kar", "c.RMI")]
    assert listed(output)[str(folder / "A.MID")] == ["2", "0:02", "1.3", "1.3", "C4-C#4", "70"]
    assert output.splitlines()[-1] == "3 files"


def test_files_that_cannot_be_read_have_a_line_and_the_rest_is_read(capsys, folder):
    (folder / "bad.mid").write_bytes(b"This is a letter")
    (folder / "gone.mid").symlink_to(folder / "nowhere")
    code, output, _ = run(capsys, folder)
    assert code == 3
    assert len(listed(output)) == 3
    assert f"cannot be read: {folder / 'bad.mid'}: this is not a MIDI file" in output
    assert f"cannot be read: {folder / 'gone.mid'}: no such file" in output
    assert output.splitlines()[-1] == "5 files, of which 2 cannot be read"


def test_several_files_and_folders_are_listed_together(capsys, folder, tmp_path):
    write_midi(piece(9), tmp_path / "nine.mid")
    code, output, _ = run(capsys, tmp_path / "nine.mid", folder)
    assert code == 0
    assert [columns[0] for columns in listed(output).values()] == ["9", "2", "3", "4"]
    code, output, _ = run(capsys, tmp_path / "nine.mid", folder / "A.MID", tmp_path / "missing.mid")
    assert code == 3
    assert [columns[0] for columns in listed(output).values()] == ["9", "2"]


def test_a_folder_without_midi_files_is_refused(capsys, tmp_path):
    (tmp_path / "._a.mid").write_bytes(b"")
    code, _, errors = run(capsys, tmp_path)
    assert code == 2
    assert f"{tmp_path}: expected MIDI files" in errors


def test_standard_input_is_read(capsys, monkeypatch, folder):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "A.MID").read_bytes())))
    code, output, errors = run(capsys, "-")
    assert (code, errors) == (0, "")
    assert output.splitlines()[1:] == run(capsys, folder / "A.MID")[1].splitlines()[1:]


def test_bad_standard_input_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"This is a letter")))
    code, _, errors = run(capsys, "-")
    assert code == 2
    assert "standard input: this is not a MIDI file" in errors


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_read(capsys, folder, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes((folder / "c.RMI").read_bytes()))
    writer.start()
    code, output, _ = run(capsys, pipe)
    writer.join()
    assert code == 0
    assert output.splitlines()[1].split()[:2] == ["notes", "4"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_in_a_folder_does_not_stop_the_list(capsys, folder):
    os.mkfifo(folder / "pipe.mid")
    code, output, _ = run(capsys, folder)
    assert (code, len(listed(output))) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a MIDI file, a folder, or -"),
        (["{}", "{}", "--tokens"], "--tokens takes one file, got 2"),
        (["{folder}", "--tokens"], "take files, got a folder"),
        (["-", "-"], "only once"),
        (["{}"] * 13 + ["--plot", "x.png"], "at most 12 files, got 13"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(capsys, folder, arguments, message):
    given = [argument.format(folder / "A.MID", folder=folder) for argument in arguments]
    code, output, errors = run(capsys, *given)
    assert (code, output) == (2, "")
    assert message in errors
