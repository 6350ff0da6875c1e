"""Run a function of a test in a process of its own, whose CPU is split into four devices."""

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_SCRIPT = """
import importlib, json, pathlib, sys
sys.path.insert(0, {tests!r})
print(json.dumps(getattr(importlib.import_module({module!r}), {function!r})(pathlib.Path({output!r}))))
"""


def run_on_four_devices(module, function, output):
    """Call a function of a module with a path. Return what was printed (last the result, as JSON), and errors."""
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(tests=str(_HERE), module=module, function=function, output=str(output))],
        cwd=_HERE.parent,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr
