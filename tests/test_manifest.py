"""The manifest of a rendered folder, shared by processes: nobody reads half a line, whatever the others do."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared_folder import PIECES, check_complete, render, requests

from app.console import CommandError
from app.rendering.leases import Leases
from app.rendering.manifest import Manifest, planned_line

ROOT = Path(__file__).parents[1]


def test_a_manifest_that_was_rewritten_in_its_inode_is_read_anew(tmp_path):
    """File systems give a free inode to the next file, so two rewrites may look like none."""
    render(tmp_path)
    reader, path = Manifest(tmp_path), tmp_path / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    changed = [line.replace(b'"made"', b'"dropped"') for line in lines]
    for content in (changed[::-1], changed[:3], lines, [*lines, changed[0]]):
        path.write_bytes(b"".join(content))
        reader.read()
        assert reader.lines == Manifest(tmp_path).lines
    assert reader.lines["0.mid"]["status"] == "dropped"


def test_half_a_line_is_left_for_later(tmp_path):
    render(tmp_path)
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        reader = Manifest(tmp_path)
        path.write_bytes(whole)
        reader.read()
        assert len(reader.lines) == PIECES
    path.write_bytes(whole[: len(whole) // 2])
    assert render(tmp_path) > 0
    check_complete(tmp_path)
    assert path.read_bytes() == whole


def in_a_process(function, folder):
    """Call a function of `shared_folder` in a process without JAX, which does not like to fork."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    code = f"import sys, pathlib, shared_folder; shared_folder.{function}(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], env=os.environ | {"PYTHONPATH": path}, check=True, timeout=300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="many processes are quick only where they fork")
@pytest.mark.parametrize("function", ["render_in_many_processes", "render_and_be_killed"])
def test_many_processes_and_kills(tmp_path, function):
    in_a_process(function, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path, monkeypatch, code):
    """Every synchronization fails once, in the middle of a piece, of a line, or of a rewrite."""
    folder, failures, real = tmp_path / "out", [], os.fsync
    for failing in range(2 * PIECES + 1):
        calls = 0

        def fsync(file, failing=failing):
            nonlocal calls
            calls += 1
            if calls > failing:
                raise OSError(code, os.strerror(code))
            real(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                render(folder)
            except OSError as error:
                failures.append(error.errno)
        for line in Manifest(folder).lines.values():
            assert (folder / line["file"]).exists()
        assert not list(folder.glob(".part.*"))
    assert len(failures) > 5
    assert set(failures) == {code}
    render(folder)
    check_complete(folder)


@pytest.mark.parametrize("held", [True, False])
def test_a_lease_file_is_never_locked_after_it_was_deleted(tmp_path, held):
    """One process opens the lease file, and before it locks it the holder deletes it: then both would hold a lease."""
    with Leases(tmp_path) as first, Leases(tmp_path) as second:
        assert first.acquire("a.mid")
        if held:
            assert not second.acquire("a.mid")
        first.release("a.mid")
        assert second.acquire("a.mid")
        assert not first.acquire("a.mid")


def test_links_in_the_folder_are_replaced_and_not_followed(tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "out"
    secret.write_bytes(b"mine")
    folder.mkdir()
    for name in ("0.mid", ".part.1.mid", ".part.manifest.jsonl"):
        (folder / name).symlink_to(secret)
    render(folder)
    check_complete(folder)
    assert secret.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_manifest_that_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "manifest.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OSError, match=f"it is a {kind}, not a file"):
        Manifest(tmp_path)


def test_lines_end_with_a_line_feed_alone(tmp_path):
    """Other characters that end lines elsewhere may be in a name."""
    name = "a\x0b\x85\u2028b.mid"
    request = requests()[0]
    manifest = Manifest(tmp_path)
    manifest.add(planned_line(request) | {"file": name, "status": "failed", "error": "\r"})
    manifest.add(planned_line(request) | {"status": "failed"})
    assert list(Manifest(tmp_path).lines) == [name, "0.mid"]


def test_a_damaged_line_names_the_file_and_the_line(tmp_path):
    render(tmp_path)
    path = tmp_path / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    reader = Manifest(tmp_path)
    path.write_bytes(b"".join([*lines, b"{}\n"]))
    with pytest.raises(CommandError, match=rf"manifest\.jsonl:{PIECES + 1} is not a record of a piece: \"{{}}\""):
        reader.read()
