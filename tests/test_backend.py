"""What is chosen for a device, and that every backend computes what plain operations do."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from event_tokens import tokens_of
from flax import nnx

from music_ar.decoding import backend as backends
from music_ar.decoding.backend import Backend, cpu_devices, select
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import shared_options
from music_ar.decoding.native import library
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.windows import WINDOWS, WindowMode
from music_ar.model.attention import Matrix
from music_ar.model.config import PRESETS, Compute
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.quantization import dequantize, quantize
from music_ar.tokens import vocabulary

# Of sizes that suit the kernel: three query heads to a key head, one of which counts time, and a context that is no
# power of two, so that several blocks make up its cache.
CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    context=48,
    latents=16,
    layers=1,
    heads=6,
    head_size=16,
    onsets=3,
    retrieval_notes=24,
    time_heads=1,
)
LATENTS = 8
PIECE = np.concatenate(
    [[vocabulary.START], np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, 130)]
).astype(np.int32)


@dataclasses.dataclass
class FakeDevice:
    platform: str
    compute_capability: str | None = None


HOPPER = FakeDevice("gpu", "9.0")
BFLOAT16 = Compute(dtype="bfloat16")


# Selection.


@pytest.mark.parametrize(
    ("platform", "compute_capability", "jax_version", "expected"),
    [
        (
            "cpu",
            None,
            (0, 10, 2),
            Backend(linear="int8", max_chunk_tokens=16, max_chunk_work=64, batch_rows=16, batch_chunk_tokens=16),
        ),
        (
            "cpu",
            None,
            (0, 12, 0, 1),
            Backend(
                linear="int8",
                int8_layout="out_in",
                key_dtype="bfloat16",
                max_chunk_tokens=16,
                max_chunk_work=64,
                batch_rows=16,
                batch_chunk_tokens=16,
            ),
        ),
        (
            "gpu",
            "9.0",
            None,
            Backend(
                compute=Compute(dtype="bfloat16", attention="cudnn"),
                linear="transposed",
                attention="pallas",
                compiler_options=(("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT"),),
                micro_batch_rows=256,
                micro_batch_options=(
                    ("xla_gpu_dot_merger_threshold_mb", 0),
                    ("xla_disable_hlo_passes", "gpu_horizontal_loop_fusion,gpu_horizontal_input_fusion"),
                ),
            ),
        ),
        ("tpu", None, None, Backend(compute=BFLOAT16)),
    ],
    ids=["CPU, JAX 0.10", "CPU, JAX 0.12", "Hopper", "TPU"],
)
def test_the_backend_of_a_device(platform, compute_capability, jax_version, expected):
    assert select(FakeDevice(platform, compute_capability), jax_version) == expected


@pytest.mark.parametrize("compute_capability", ["8.0", "10.0", None])
def test_other_gpus_have_no_kernel_and_no_micro_batches(compute_capability):
    assert select(FakeDevice("gpu", compute_capability)) == dataclasses.replace(
        select(HOPPER), attention="plain", micro_batch_rows=None
    )


def test_the_default_is_the_first_device_and_the_installed_jax():
    assert select() == select(jax.local_devices()[0], jax.__version_info__)
    assert Decoder(noisy_model(PRESETS["tiny"])).backend == select()


@pytest.mark.parametrize(
    ("sizes", "suited"),
    [
        ({}, True),
        ({"head_size": 12}, False),
        ({"head_size": 8}, False),
        ({"head_size": 128}, False),
        ({"context": 40}, False),
    ],
)
def test_the_kernel_is_left_out_where_sizes_do_not_suit_it(sizes, suited):
    config, chosen = dataclasses.replace(CONFIG, **sizes), select(HOPPER)
    expected = chosen if suited else dataclasses.replace(chosen, attention="plain", micro_batch_rows=None)
    assert chosen.suited_to(config) == expected
    assert Backend().suited_to(config) == Backend()


@pytest.mark.parametrize("head_size", [12, 128])
def test_a_kernel_asked_for_that_does_not_suit_is_refused(head_size):
    model = noisy_model(dataclasses.replace(CONFIG, head_size=head_size))
    with pytest.raises(ValueError, match=rf"head_size of 16, 32 or 64.* multiple of 16; got {head_size} and 48"):
        Decoder(model, Backend(attention="interpreted"))


def test_a_decoder_leaves_the_kernel_out_by_itself(monkeypatch):
    """Where it is chosen by default; what was asked for is refused, as above."""
    chosen = dataclasses.replace(select(HOPPER), compute=Compute())
    monkeypatch.setattr(backends, "select", lambda: chosen)
    assert Decoder(noisy_model(PRESETS["tiny"])).backend == chosen.suited_to(PRESETS["tiny"]) != chosen


@pytest.mark.parametrize(
    ("environment", "installed", "compiled", "expected"),
    [
        ({}, (), True, True),
        ({}, (), False, False),
        ({"MUSIC_AR_CPU": "jax"}, (), True, False),
        ({"MUSIC_AR_CPU": "avx2"}, (), True, True),
        ({"JAX_PLATFORMS": "cpu"}, ("jax_plugins", "libtpu"), True, True),
        ({"JAX_PLATFORMS": "cuda"}, (), True, False),
        ({}, ("jax_plugins",), True, True),  # for a GPU that this machine does not have
        ({}, ("libtpu",), False, False),
    ],
)
def test_the_native_engine_decodes_on_a_cpu_if_it_was_compiled(monkeypatch, environment, installed, compiled, expected):
    for name in ("MUSIC_AR_CPU", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(library, "load", lambda: object() if compiled else None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    assert backends.native() == expected


def test_an_accelerator_keeps_its_jax(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(library, "load", object)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(jax, "local_devices", lambda: [HOPPER])
    assert not backends.native()


def test_chunks_of_many_rows_are_shorter():
    cpu = Backend(max_chunk_tokens=16, max_chunk_work=64)
    assert [cpu.chunk_tokens(rows) for rows in (1, 4, 5, 16, 200)] == [16, 16, 12, 4, 1]
    assert [Backend().chunk_tokens(rows) for rows in (1, 200)] == [64, 64]


def test_only_even_batches_with_enough_rows_are_split():
    split = Backend(micro_batch_rows=256)
    assert [split.micro_batches(rows) for rows in (1, 255, 256, 257, 258)] == [1, 1, 2, 1, 2]
    assert Backend().micro_batches(256) == 1


def test_options_of_micro_batches_come_with_them():
    backend = Backend(compiler_options=(("a", 1),), micro_batch_options=(("b", 2),))
    assert backend.options(1) == (("a", 1),)
    assert backend.options(2) == (("a", 1), ("b", 2))


@pytest.mark.parametrize(
    ("version", "many_rows", "cores", "devices"),
    [
        ("0.10.2", False, 4, 4),
        ("0.12.0", False, 4, 2),
        ("0.12.0", True, 4, 4),
        ("1.0.0", False, 1, 1),
        ("0.10.2", True, 99, 16),
    ],
)
def test_devices_of_a_cpu(monkeypatch, version, many_rows, cores, devices):
    monkeypatch.setattr(backends, "usable_cores", lambda: cores)
    monkeypatch.setattr(backends.metadata, "version", {"jax": version}.__getitem__)
    assert cpu_devices(many_rows=many_rows) == devices


# Imports.


def test_requests_and_the_number_of_devices_need_no_jax():
    """JAX must be told how many devices to make of the CPU before it is imported."""
    modules = [f"music_ar.decoding.{name}" for name in ("backend", "request", "sampling")]
    program = f"import sys, {', '.join(modules)}; print(sorted(sys.modules.keys() & {{'jax', 'jaxlib', 'flax'}}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_without_pallas_triton_it_decodes_plainly(monkeypatch):
    """JAX has deprecated it."""
    name = "jax.experimental.pallas.triton"
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    for module in ("pallas_attention", "pallas_kernel"):
        monkeypatch.delitem(sys.modules, f"music_ar.decoding.{module}", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda of, *rest: None if of == name else find_spec(of, *rest))
    with pytest.raises(ImportError):
        importlib.import_module("music_ar.decoding.pallas_attention")
    chosen = select(HOPPER)
    assert (chosen.attention, chosen.micro_batch_rows) == ("plain", None)
    # All of it that a CPU has, too.
    on_a_cpu = dataclasses.replace(chosen, compute=Compute(), compiler_options=(), micro_batch_options=())
    decoder = Decoder(noisy_model(PRESETS["tiny"]), on_a_cpu.suited_to(PRESETS["tiny"]))
    state = decoder.start([tokens_of(vocabulary.START)], latents=LATENTS, seeds=[0], limit_steps=2**30)
    _, tokens = decoder.decode(state, shared_options(SamplingOptions()), length=4)
    assert vocabulary.PAD not in np.asarray(tokens)


# All backends compute the same.


@pytest.fixture(scope="module")
def model():
    """A model whose matrices int8 holds without rounding, as those of a shipped one."""
    model = noisy_model(CONFIG)
    for _, module in list(nnx.iter_modules(model)):
        for child in list(vars(module).values()):
            if isinstance(child, nnx.Linear | Matrix):
                matrix = child.kernel if isinstance(child, nnx.Linear) else child
                matrix[...] = jnp.asarray(dequantize(*quantize(np.asarray(matrix[...]))))
    return model


def forced(model, backend, mode: WindowMode = "sliding", steps=40):
    """Logits of three rows: one from nothing, one past its context, and one whose piece replaced another."""
    decoder = Decoder(model, backend)

    def start(prompts):
        return decoder.start(prompts, latents=LATENTS, seeds=[0] * len(prompts), limit_steps=2**30, mode=mode)

    state = start([PIECE[:1], PIECE[:70], PIECE[:5]]).replaced(2, start([PIECE[:9]]))
    # Each row has its own number of latents.
    state = state._replace(latents_B=jnp.array([LATENTS, LATENTS - 3, LATENTS - 4], jnp.int32))
    return np.asarray(decoder.teacher_force(state, np.stack([PIECE[at:][:steps] for at in (1, 70, 9)]))[1])


@pytest.fixture(scope="module")
def plain(model):
    """Logits by plain operations, by mode."""
    return {mode: forced(model, Backend(), mode) for mode in WINDOWS}


@pytest.mark.parametrize(
    ("backend", "mode", "tolerance"),
    [
        (Backend(linear="transposed"), "sliding", 5e-5),
        (Backend(attention="interpreted"), "exact", 2e-5),
        (Backend(attention="interpreted", linear="transposed"), "sliding", 5e-5),
        # Activations have 15 bits.
        (Backend(linear="int8"), "sliding", 1e-3),
        # Keys have 8 bits. (Both layouts give the same to the last bit, see `test_int8_layers`.)
        (Backend(linear="int8", int8_layout="out_in", key_dtype="bfloat16"), "exact", 4e-3),
    ],
    ids=["transposed", "kernel", "kernel, transposed", "int8", "int8 out, in, keys in bfloat16"],
)
def test_every_backend_computes_the_same(model, plain, backend, mode, tolerance):
    """Before, at and after the caches wrap, of 8 latents and of 48 inputs."""
    expected = plain[mode]
    tolerance *= np.abs(expected).max() if backend.linear == "int8" else 1
    np.testing.assert_allclose(forced(model, backend, mode), expected, atol=tolerance)


def test_in_bfloat16_the_kernel_is_as_accurate_as_plain_operations(model, plain):
    rough = PerceiverAR(CONFIG, rngs=nnx.Rngs(0), compute=BFLOAT16)
    nnx.update(rough, nnx.state(model))
    errors = [
        np.abs(forced(rough, Backend(compute=BFLOAT16, attention=attention)) - plain["sliding"]).mean()
        for attention in ("interpreted", "plain")
    ]
    assert 0 < errors[0] < 1.1 * errors[1]


def test_micro_batches_of_the_kernel_give_what_plain_operations_give(model):
    """Each finds its own rows in all caches, and samples the same piece; with two windows per row, as with one."""
    found = []
    for backend in (Backend(), Backend(attention="interpreted", micro_batch_rows=4)):
        decoder = Decoder(model, backend)
        prompts = [PIECE[:9], PIECE[:70], PIECE[:5], PIECE[:1]]
        state = decoder.start(prompts, latents=LATENTS, seeds=range(4), limit_steps=2**30, mode="exact")
        _, tokens, nats = decoder.decode_scored(state, shared_options(SamplingOptions()), length=24)
        found.append((np.asarray(tokens), np.asarray(nats)))
    (tokens, nats), (expected_tokens, expected_nats) = found
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(nats, expected_nats, atol=2e-5)
