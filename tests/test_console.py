"""Progress, tables and times, where standard error is not a terminal."""

import os
import sys
from pathlib import Path

import pytest

from app import console
from app.console import CommandError, ProgressLine, check_writable, clock, print_table


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes")
def test_what_cannot_be_a_new_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    cases = {
        tmp_path: "it is a folder",
        tmp_path / "pipe": "it is a pipe or a device",
        Path("/dev/null"): "it is a pipe or a device",
        tmp_path / "nowhere" / "file": "does not exist; create it first",
        tmp_path / "file" / "file": "does not exist; create it first",
        tmp_path / ("é" * 121): "at most 240 bytes, got 242",
    }
    for path, message in cases.items():
        with pytest.raises(CommandError, match=message):
            check_writable(path)
    for name in ("file", "new", "x" * 240):
        check_writable(tmp_path / name)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599, "59:59"), (36_610, "10:10:10")]
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_tables_are_aligned(capsys):
    print_table(("split", "notes"), [("train", "5,659"), ("test", "7")])
    assert capsys.readouterr().out == "split  notes\ntrain  5,659\ntest       7\n"


def test_without_a_terminal_progress_is_a_line_every_few_seconds(capsys, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now_s)
    with ProgressLine("starting", seconds_between_lines=5) as line:
        for second in range(11):
            now_s = 100.0 + second
            line.report(second / 10, f"after {second} s")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["starting", "after 0 s", "after 5 s", "after 10 s"]
    assert printed.out == ""
