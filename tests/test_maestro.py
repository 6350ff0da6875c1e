"""The official archive: what is read from it, and that errors name what is wrong with it."""

import pytest
from tiny_maestro import PIECES, archive_files, midi_bytes, table, write_folder, write_zip

from data_pipeline import maestro
from data_pipeline.maestro import MidiFiles, read_table
from data_pipeline.manifest import DatasetError


def test_zip_and_unpacked_folder_are_the_same_data_set(tmp_path):
    files = archive_files()
    zipped = MidiFiles(write_zip(tmp_path / "maestro.zip", files))
    unpacked = MidiFiles(write_folder(tmp_path / "folder", files))
    for source in (zipped, unpacked):
        pieces = read_table(source)
        assert {piece.name: piece.split for piece in pieces} == PIECES
        assert [source.read(piece.path) for piece in pieces] == [files[piece.name] for piece in pieces]
        assert pieces[1].composition == "Composer, A.: bagatelle"
    assert [zipped.checksum(piece.path) for piece in read_table(zipped)] == [
        unpacked.checksum(piece.path) for piece in read_table(unpacked)
    ]


def test_a_folder_around_the_unpacked_folder_is_accepted(tmp_path):
    write_folder(tmp_path / "outer" / "maestro-v3.0.0", archive_files())
    with MidiFiles(tmp_path / "outer") as files:
        assert read_table(files)[0].path == "maestro-v3.0.0/2004/aria.midi"


def test_hidden_files_and_macos_copies_are_not_listed(tmp_path):
    junk = {"__MACOSX/2004/._aria.midi": b"", "2004/._aria.midi": b"", ".git/maestro-x.csv": b""}
    for source in (
        write_zip(tmp_path / "maestro.zip", {**archive_files(), **junk}),
        write_folder(tmp_path / "folder", {**archive_files(), **junk}),
    ):
        assert len(read_table(MidiFiles(source))) == len(PIECES)


def _without(files, name):
    return {key: content for key, content in files.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: _without(files, "2006/caprice.midi"),
            r"1 listed in the table but missing: .*2006/caprice\.midi",
        ),
        (lambda files: {**files, "2018/x.mid": b"MThd"}, r"1 MIDI files not listed in the table: .*2018/x\.mid"),
        (lambda files: _without(files, "maestro-v3.0.0.csv"), r"expected one MAESTRO table.*found none.*--midi FOLDER"),
        (lambda files: {**files, "maestro-v2.0.0.csv": b""}, r"expected one MAESTRO table.*found .*v2.*v3"),
        (
            lambda files: {**files, "maestro-v3.0.0.csv": b"canonical_composer,split\nA,train\n"},
            r"expected the columns .*, split, midi_filename; found no canonical_title, midi_filename",
        ),
        (lambda files: {**files, "maestro-v3.0.0.csv": table({})}, r"maestro-v3\.0\.0\.csv: no rows"),
        (lambda files: {**files, "maestro-v3.0.0.csv": b"\xff\xfe"}, r"not a readable CSV"),
        (
            lambda files: {**files, "maestro-v3.0.0.csv": table({**PIECES, "2004/aria.midi": "dev"})},
            r"'2004/aria\.midi' has split 'dev'; expected one of train, validation, test",
        ),
        (
            lambda files: {**files, "maestro-v3.0.0.csv": table(PIECES) + b"c,t,test,2004,2004/aria.midi\n"},
            r"listed more than once: 2004/aria\.midi",
        ),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_a_mismatch_with_the_table_is_named(tmp_path, write, change, message):
    source = write(tmp_path / "source", change(archive_files()))
    with MidiFiles(source) as files, pytest.raises(DatasetError, match=message):
        read_table(files)


def test_a_long_list_of_names_is_shortened_and_counted(tmp_path):
    many = {f"2004/{number:03}.midi": "train" for number in range(30)}
    source = write_folder(tmp_path / "folder", {"maestro-v3.0.0.csv": table(many)})
    with MidiFiles(source) as files, pytest.raises(DatasetError, match=r"30 listed .*2004/009\.midi and 20 more"):
        read_table(files)


def test_neither_zip_nor_folder(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.zip: no such zip or folder"):
        MidiFiles(tmp_path / "absent.zip")
    whole = write_zip(tmp_path / "maestro.zip", archive_files()).read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"half\.zip: neither a folder nor a readable zip"):
        MidiFiles(tmp_path / "half.zip")


def test_a_damaged_member_is_named(tmp_path):
    path = write_zip(tmp_path / "maestro.zip", archive_files())
    content = bytearray(path.read_bytes())
    middle = content.index(b"2006/caprice.midi") + 100
    content[middle] ^= 0xFF
    path.write_bytes(content)
    with MidiFiles(path) as files, pytest.raises(DatasetError, match=r"2006/caprice\.midi: cannot be read"):
        files.read("maestro-v3.0.0/2006/caprice.midi")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(maestro, "MAX_FILE_BYTES", 100)
    files = {"small.mid": b"x" * 100, "large.mid": midi_bytes(0) + bytes(100)}
    for source in (write_zip(tmp_path / "a.zip", files), write_folder(tmp_path / "a", files)):
        with MidiFiles(source) as opened:
            small, large = sorted(opened.midi_names(), reverse=True)
            assert len(opened.read(small)) == 100
            with pytest.raises(DatasetError, match=r"large\.mid: cannot be read \(it has more than"):
                opened.read(large)
