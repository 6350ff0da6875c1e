"""Atomic writes: the new file or the old one, whatever fails."""

import os
from pathlib import Path

import pytest

from music_ar.files import replacing, write_atomically


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(*failing, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_names_the_target_not_the_partial_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "nowhere" / "file", b"")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")


def test_an_error_in_the_block_keeps_its_own_file_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
    assert not list(tmp_path.iterdir())


def test_a_named_partial_file_that_a_killed_process_left_is_overwritten(tmp_path):
    path, part = tmp_path / "file", tmp_path / ".part.file"
    part.write_bytes(b"the beginning of something longer")
    with replacing(path, part=part) as file:
        file.write(b"whole")
        file.flush()
        assert part.read_bytes() == b"whole"
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
