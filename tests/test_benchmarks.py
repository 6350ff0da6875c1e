"""The benchmark that checks something, at a small size."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_unattended(tiny_checkpoint, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    options = ["--prompts", 10, "--prompt-seconds", 2, "--seconds", 1, "--latents", 16, "--batch-size", 2]
    arguments = ["unattended.py", prepared, tmp_path, "--checkpoint", tiny_checkpoint, *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "unattended.py"), run_name="__main__")
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    assert [name for name, passed in checks.items() if not passed] == []
    assert stop.value.code == 0
    # What it reports is what the folders hold.
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["status"] for line in lines) == ["failed"] * 12 + ["made"] * 8
    assert (tmp_path / "resumed/manifest.jsonl").read_bytes() == (tmp_path / "whole/manifest.jsonl").read_bytes()
