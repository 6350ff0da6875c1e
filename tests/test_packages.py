"""What packages offer: every public name is there, and importing a package that only lists names starts nothing."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("music_ar", *(f"music_ar.{name}" for name in ("decoding", "evaluation", "metrics", "model", "training")))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_importing_the_packages_imports_no_jax():
    code = f"import sys\nfor name in {PACKAGES!r}: __import__(name)\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
