"""The build hook: the engine is compiled where a compiler is there, and no install fails where none is."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from music_ar.decoding.native import library

ROOT = Path(__file__).parents[1]
COMPILER = next(filter(None, map(shutil.which, ["c++", "g++", "clang++"])), None)
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="the compiler that fails is a shell script")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    shutil.copy(ROOT / "music_ar/decoding/native/sources.py", folder)
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }')
    (folder / "two.cpp").write_text('extern "C" int one(); extern "C" int two() { return 2 * one(); }')
    return folder


@needs_compiler
def test_all_sources_become_one_library(hook, sources):
    assert hook.compile_engine(sources, sources / "_engine.so")
    assert ctypes.CDLL(str(sources / "_engine.so")).two() == 2
    assert sorted(path.name for path in sources.iterdir()) == ["_engine.so", "one.cpp", "sources.py", "two.cpp"]


@needs_compiler
def test_a_library_of_other_sources_is_not_loaded(hook, tmp_path, monkeypatch):
    """As after `git pull` in a checkout, where nothing compiles it again."""
    native = tmp_path / "native"
    shutil.copytree(ROOT / "music_ar/decoding/native", native, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(library, "PATH", native / "_engine.so")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)  # without its cache
    assert library.load() is None
    assert hook.compile_engine(native, native / "_engine.so")
    assert library.load() is not None
    with (native / "engine.cpp").open("a") as file:
        file.write("// changed\n")
    assert library.load() is None


def a_compiler_that_fails(folder):
    path = folder / "old++"
    path.write_text("#!/bin/sh\necho 'unrecognized option -std=c++17' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "library", "message"),
    [
        ("none", "_engine.so", "no C++ compiler"),
        pytest.param("old", "_engine.so", "unrecognized option -std=c++17", marks=needs_shell),
        ("none of that name", "_engine.so", "no C++ compiler"),
        ("an open quote", "_engine.so", "quotation"),
        pytest.param("usual", "missing/_engine.so", "", marks=needs_compiler),  # a folder that cannot be written
        pytest.param("usual, broken sources", "_engine.so", "error", marks=needs_compiler),
    ],
)
def test_what_cannot_be_compiled_is_one_warning(hook, sources, monkeypatch, capsys, compiler, library, message):
    monkeypatch.delenv("CXX", raising=False)
    if "broken" in compiler:
        (sources / "one.cpp").write_text("no C++")
    if not compiler.startswith("usual"):
        monkeypatch.setenv("PATH", str(sources))
    if compiler == "old":
        monkeypatch.setenv("CXX", a_compiler_that_fails(sources))
    if compiler == "none of that name":
        monkeypatch.setenv("CXX", "no-such-compiler -O2")
    if compiler == "an open quote":
        monkeypatch.setenv("CXX", "'c++")
    before = sorted(sources.iterdir())
    assert not hook.compile_engine(sources, sources / library)
    assert sorted(sources.iterdir()) == before
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("music-ar: warning: ")
    assert message in line


@pytest.fixture
def project(tmp_path):
    """What a build needs of this project."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("app", "data_pipeline", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept.txt").touch()
    native = ROOT / "music_ar" / "decoding" / "native"
    shutil.copytree(
        native, tmp_path / "music_ar" / "decoding" / "native", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def build(project, kind):
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", project / "dist"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    [built] = (project / "dist").iterdir()
    return built, result.stderr


@pytest.mark.slow
@needs_compiler
def test_a_wheel_holds_the_engine_and_is_for_one_platform(project):
    wheel, _ = build(project, "wheel")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert not wheel.name.endswith("any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "music_ar/decoding/native/_engine.so" in archive.namelist()
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in archive.read(metadata).decode()
    assert not (project / "music_ar/decoding/native/_engine.so").exists()


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure(project, monkeypatch):
    monkeypatch.setenv("PATH", str(project))
    wheel, errors = build(project, "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "music-ar: warning: " in errors
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "music_ar/decoding/native/_engine.so" not in names
    assert any(name.endswith(".cpp") for name in names)


@pytest.mark.slow
@needs_compiler
def test_an_editable_install_compiles_in_place(project):
    build(project, "wheel:editable")
    assert (project / "music_ar/decoding/native/_engine.so").is_file()


@pytest.mark.slow
def test_the_sources_are_in_the_source_distribution(project):
    archive, _ = build(project, "sdist")
    shutil.unpack_archive(archive, project / "unpacked")
    [folder] = (project / "unpacked").iterdir()
    assert (folder / "hatch_build.py").is_file()
    assert list((folder / "music_ar/decoding/native").glob("*.cpp"))
    assert not list(folder.rglob("*.so"))
