"""Which files in folders are MIDI files: the same for `prepare`, `render` and `inspect`."""

import zipfile

from app.rendering.plan import find_prompts
from data_pipeline.maestro import MidiFiles
from music_ar.midi.folders import find_midi_files

MIDI = ["B.MID", "a.mid", "below/c.Midi", "below/deep/d.kar", "e.RMI"]
OTHERS = ["._a.mid", ".hidden.mid", "below/._c.midi", ".git/f.mid", "__MACOSX/a.mid", "mid", "g.mid.txt", "h.midix"]


def test_midi_files_are_found_by_their_endings_and_hidden_files_are_not(tmp_path):
    folder, archive = tmp_path / "music", tmp_path / "music.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in MIDI + OTHERS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
            zipped.writestr(name, b"")
    (folder / "folder.mid").mkdir()
    assert [path.relative_to(folder).as_posix() for path in find_midi_files(folder)] == MIDI
    assert [prompt.path for prompt in find_prompts([str(folder)])] == [(folder / name).as_posix() for name in MIDI]
    for source in (folder, archive):
        with MidiFiles(source) as files:
            assert files.midi_names() == MIDI


def test_a_hidden_folder_that_is_asked_for_is_searched(tmp_path):
    (tmp_path / ".music").mkdir()
    (tmp_path / ".music" / "a.mid").write_bytes(b"")
    assert find_midi_files(tmp_path / ".music") == [tmp_path / ".music" / "a.mid"]
