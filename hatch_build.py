"""Build hook: compiles the decoding engine of CPUs, if there is a C++ compiler.

An install never fails for it. Without the engine, decoding runs in JAX, and `music-ar bench` says so. In a checkout,
`python hatch_build.py` compiles it again after a change.
"""

import contextlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

FOLDER = Path("music_ar", "decoding", "native")
LIBRARY = "_engine.so"
# No -march: the engine chooses its instructions at run time.
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
TIMEOUT_S = 600


class EngineHook(BuildHookInterface):
    """Compiles into the checkout for an editable install, otherwise beside it and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make it a wheel of this platform if that worked."""
        sources = Path(self.root, FOLDER)
        if version == "editable":
            self._folder = None
            compile_engine(sources, sources / LIBRARY)
            return
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name, LIBRARY)
        if compile_engine(sources, library):
            build_data["force_include"][str(library)] = (FOLDER / LIBRARY).as_posix()
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        del version, build_data, artifact_path
        if self._folder is not None:
            self._folder.cleanup()


def compile_engine(sources: Path, library: Path) -> bool:
    """Compile the C++ files of a folder into a shared library; if that fails, print why and return False."""
    files = sorted(map(str, sources.glob("*.cpp")))
    part = library.with_name(f".{library.name}.{os.getpid()}.part")
    stamp = part.with_suffix(".cpp")  # by which `native.library` knows whether the library is up to date
    try:
        compilers = [shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]]
        compiler = next((each for each in compilers if each and shutil.which(each[0])), None)
        if compiler is None:
            raise OSError("there is no C++ compiler (looked for $CXX, c++, g++ and clang++)")
        digest = runpy.run_path(str(sources / "sources.py"))["digest"](sources)
        stamp.write_text(f'extern "C" const char* music_ar_sources() {{ return "{digest}"; }}\n')
        command = [*compiler, *FLAGS, *files, str(stamp), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{compiler[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        part.replace(library)
    except Exception as error:  # whatever it is, the install must not fail for it
        print(f"music-ar: warning: decoding on a CPU will be slower, in JAX: {error}", file=sys.stderr)
        return False
    finally:
        for rest in (part, stamp):
            with contextlib.suppress(OSError):
                rest.unlink()
    return True


def _platform() -> str:
    """The platform of this machine alone: the library is linked to what is installed here."""
    return next(tag for tag in platform_tags() if "manylinux" not in tag and "musllinux" not in tag)


if __name__ == "__main__":
    folder = Path(__file__).parent / FOLDER
    sys.exit(not compile_engine(folder, folder / LIBRARY))
