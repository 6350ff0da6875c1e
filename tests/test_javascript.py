"""The page's modules, tested by node's own runner."""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "js"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
@pytest.mark.parametrize("script", sorted(TESTS.glob("*.test.mjs")), ids=lambda script: script.name)
def test_the_module(script):
    run = subprocess.run(["node", "--test", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
