"""On a CPU with the native engine, everything that plays music starts without JAX, which takes seconds to import."""

import os
import subprocess
import sys

import pytest

from music_ar.decoding import backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.native(), reason="the native engine was not compiled"),
]
COMMAND = "from app import cli; code = cli.main({arguments!r}); assert not code, code"
GENERATOR = """
from music_ar import Generator
generator = Generator.from_pretrained({checkpoint!r})
assert len(generator.generate(seconds=2.0, seed=1))
"""
PAGE = """
from app.web.manager import SessionManager
from app.web.server import build_app
from app.web.settings import Settings
from app.web.warmup import Machine
from music_ar import Generator
machine = Machine(Generator.from_pretrained({checkpoint!r}))
machine.warm_up()
manager = SessionManager(machine)
build_app(manager)
*_, last = manager.generate(manager.session("tab"), Settings(seconds=5))
assert len(last.pieces[0])
"""


def imported_by(code, folder, **environment):
    """Which of JAX's packages a program imports."""
    end = "\nimport sys; print(*sorted({'jax', 'jaxlib', 'flax'} & {name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code + end],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--output", "piece.mid", "--seconds", "2"],
        ["generate", "--output", "piece.mid", "--prompt", "MIDI", "--seconds", "2", "--variations", "2"],
        ["generate", "--output", "piece.mid", "--seconds", "2", "--latents", "auto"],
        ["render", "MIDI", "--output", "out", "--seconds", "2", "--count", "2"],
        ["bench", "decode", "--latents", "8", "--tokens", "1"],
        ["bench", "render", "--latents", "8", "--pieces", "2", "--loop-pieces", "1", "--seconds", "1"],
    ],
    ids=["generate", "prompt", "auto", "render", "bench decode", "bench render"],
)
def test_commands(arguments, tiny_checkpoint, midi_file, tmp_path):
    given = [str(midi_file) if argument == "MIDI" else argument for argument in arguments]
    code = COMMAND.format(arguments=[*given, "--checkpoint", str(tiny_checkpoint)])
    assert imported_by(code, tmp_path) == []
    assert imported_by(code, tmp_path, MUSIC_AR_CPU="jax") != []  # what the test can tell


@pytest.mark.parametrize("code", [GENERATOR, PAGE], ids=["Generator", "page"])
def test_from_python(code, tiny_checkpoint, tmp_path):
    assert imported_by(code.format(checkpoint=str(tiny_checkpoint)), tmp_path) == []
