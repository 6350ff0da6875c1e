"""Benchmarks that check something do so, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_unattended(tiny_checkpoint, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    options = ["--prompts", 10, "--prompt-seconds", 2, "--seconds", 1, "--latents", 16, "--batch-size", 2]
    result = subprocess.run(
        [sys.executable, "benchmarks/unattended.py", prepared, tmp_path, "--checkpoint", tiny_checkpoint,
         *map(str, options)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    checks = json.loads(result.stdout.splitlines()[-1])["checks"]
    assert [name for name, passed in checks.items() if not passed] == [], result.stderr
    assert result.returncode == 0
    # Its word is true of what lies there.
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["status"] for line in lines) == ["failed"] * 12 + ["made"] * 8
    assert (tmp_path / "resumed/manifest.jsonl").read_bytes() == (tmp_path / "whole/manifest.jsonl").read_bytes()
