"""What every test relies on: strict JAX on the CPU, hypothesis without deadlines, and small real inputs."""

import contextlib
import gc
import hashlib
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from hypothesis import settings
from web_browser import address, browser, page  # noqa: F401 (fixtures)

from music_ar.midi.io import write_midi
from music_ar.midi.performance import Performance

# Set before JAX is imported, and inherited by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")  # the command line would make several; tests of several say so
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def compilation_cache() -> Path:
    """Where compiled programs are kept between runs, since tests are mostly compilation.

    JAX's keys hold the program, its options and the compiler's version, but not the instruction set of the CPU.
    """
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1] if cpu.exists() else []
    machine = hashlib.sha256("".join([platform.machine(), platform.processor(), *flags]).encode()).hexdigest()[:12]
    return Path(platformdirs.user_cache_dir("music-ar", appauthor=False)) / "tests" / machine


def remove_unused(cache: Path, days: int = 14) -> None:
    """Removes programs that no test has used for so long."""
    for file in cache.glob("*"):
        if time.time() - file.stat().st_mtime > days * 86_400:
            file.unlink(missing_ok=True)


if not os.environ.keys() & {"PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"}:  # neither a worker nor started by a test
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache())
    remove_unused(compilation_cache())

# In the background of a shell Ctrl-C is ignored, and so would it be by the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared machines stall, and the first example pays for compilation: time says nothing about correctness here.
settings.register_profile("music-ar", deadline=None, print_blob=True)
settings.load_profile("music-ar")


# A file's tests stay on one worker, so that its fixtures and compilations are made once. These files take longest and
# come first, the longest before the others; the short ones then fill the time until both workers are done.
LONG_FILES = (
    "test_decoding", "test_backend", "test_train_step", "test_training", "test_system", "test_rendering", "test_model",
    "test_web", "test_cli", "test_generator", "test_generation_session", "test_train", "test_report",
    "test_evaluation", "test_examples", "test_benchmarks",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forget compiled programs once there are many.

    Each takes some memory maps. Linux allows a process 65,530, and XLA crashes at the next one.
    """
    yield
    if "jax" in sys.modules and memory_maps() > 20_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


def memory_maps() -> int:
    """Number of memory maps of this process; 0 where there is no telling."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def make_performance(seed: int, notes: int = 200) -> Performance:
    """A performance of random notes with the time step of the events, about 6 notes a second."""
    rng = np.random.default_rng(seed)
    onset_s = np.cumsum(rng.integers(0, 33, notes)) / 100
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + rng.integers(5, 150, notes) / 100,
        pitch=rng.integers(30, 100, notes),
        velocity=rng.integers(20, 110, notes),
    )


@pytest.fixture
def any_types():
    """Lets a call have values of the wrong types, as it may outside tests: here, annotations are checked first."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def midi_file(tmp_path):
    """A MIDI file of 200 notes, 30 to 40 seconds."""
    path = tmp_path / "some notes.mid"
    write_midi(make_performance(0), path)
    return path


@pytest.fixture(scope="session")
def midi_folder(tmp_path_factory):
    """A folder of ten MIDI files."""
    folder = tmp_path_factory.mktemp("midi")
    for seed in range(10):
        write_midi(make_performance(seed), folder / f"piece {seed}.mid")
    return folder


@pytest.fixture(scope="session")
def prepared(midi_folder, tmp_path_factory):
    """A prepared folder: eight pieces to train on, one to validate, one to test."""
    from data_pipeline.prepare import prepare_midi

    folder = tmp_path_factory.mktemp("prepared")
    prepare_midi(midi_folder, folder, workers=1)
    return folder


def noisy_model(config, seed=0):
    """A model with random weights everywhere: a fresh one is the identity with uniform logits, which hides mistakes.

    Leaving at an exit costs about 1 nat; in a fresh model no token leaves early.
    """
    from flax import nnx

    from music_ar.model.perceiver_ar import PerceiverAR

    model = PerceiverAR(config, rngs=nnx.Rngs(seed))
    if config.exits:
        model.exit_costs.bias[...] *= 0
    return with_noise(model, seed)


def with_noise(model, seed=0):
    """A model with noise added to all weights."""
    import jax
    from flax import nnx

    rng = np.random.default_rng(seed + 1)  # JAX would compile a draw for each shape, which takes longer than the rest

    def noisy(leaf):
        return jax.numpy.asarray(np.asarray(leaf) + 0.3 * rng.standard_normal(leaf.shape, np.float32))

    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(noisy, params))


@pytest.fixture
def compilations():
    """A context that collects the names of the programs that JAX compiles in it."""
    import jax.monitoring

    @contextlib.contextmanager
    def collecting():
        names: list[str] = []

        def on_event(event, duration_secs, **details):
            del duration_secs
            if event == "/jax/core/compile/backend_compile_duration":
                names.append(str(details.get("fun_name")))

        jax.monitoring.register_event_duration_secs_listener(on_event)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(on_event)

    return collecting


@pytest.fixture(scope="module", params=["native", "jax"])
def decoder(request, tiny_checkpoint):
    """The tiny checkpoint in each decoder: the native engine, if it was compiled, and JAX."""
    from music_ar.decoding import backend
    from music_ar.decoding.decoder import Decoder
    from music_ar.decoding.loading import load_decoder
    from music_ar.model.pretrained import load_pretrained

    if request.param == "jax":
        return Decoder(load_pretrained(tiny_checkpoint))
    if not backend.native():
        pytest.skip("the native engine was not compiled")
    return load_decoder(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A pretrained checkpoint of the tiny preset, with random weights everywhere."""
    from music_ar.model.config import PRESETS
    from music_ar.model.pretrained import save_pretrained

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_pretrained(noisy_model(PRESETS["tiny"]), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A folder with a pretrained piece encoder of the tiny preset, with random weights everywhere."""
    from flax import nnx

    from music_ar.embedding import PRESETS, PieceEncoder, save_encoder

    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_encoder(with_noise(PieceEncoder(PRESETS["tiny"], rngs=nnx.Rngs(0))), folder)
    return folder
