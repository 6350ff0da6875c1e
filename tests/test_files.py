"""Atomic writes: the new file or the old one, whatever fails."""

import os
import sys
from pathlib import Path

import pytest

from music_ar.files import MAX_NAME_BYTES, parse_json, read_file, replacing, write_atomically


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


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * MAX_NAME_BYTES)
    write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_replaced_and_not_followed(tmp_path):
    path, part, other = tmp_path / "file", tmp_path / "part", tmp_path / "other"
    other.write_bytes(b"mine")
    path.symlink_to(other)
    part.symlink_to(other)
    write_atomically(path, b"new", part=part)
    assert other.read_bytes() == b"mine"
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"


def test_a_file_is_read_whole_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    for size in (0, 1, 100):
        path.write_bytes(b"x" * size)
        assert read_file(path) == read_file(str(path), max_bytes=100) == b"x" * size
    (tmp_path / "link").symlink_to(path)
    assert read_file(tmp_path / "link") == b"x" * 100
    with pytest.raises(OSError, match="it has more than") as caught:
        read_file(path, max_bytes=99)
    assert caught.value.filename == str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes and devices")
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (os.mkfifo, "it is a pipe, not a file"),
        (os.mkdir, "it is a folder, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (lambda path: path.symlink_to(path), "Too many levels"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda _: None, "No such file"),
    ],
    ids=["pipe", "folder", "device", "loop", "dead link", "nothing"],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, make, error):
    make(tmp_path / "odd")
    with pytest.raises(OSError, match=error) as caught:
        read_file(tmp_path / "odd")
    assert caught.value.filename == str(tmp_path / "odd")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800"])
def test_names_that_no_file_can_have_are_errors_of_the_file(name):
    with pytest.raises(OSError, match="no file can have this name"):
        read_file(name)


def test_json_nested_too_deeply_is_no_value():
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    for text in ("[" * 100_000, '{"a":' * 100_000, "[1", "", b"\xff", "9" * 5000):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
