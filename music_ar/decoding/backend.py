"""How decoding differs between devices, decided once.

On a CPU the native engine decodes, without JAX; `native` says whether it can. Elsewhere `select` looks at the device
and the JAX version and returns a frozen `Backend`, which is handed down. Nothing else in the project checks the
platform or the JAX version, so every path can be tested on a CPU. Importing this module does not import JAX.
Measurements: docs/results/decoding.md.
"""

import dataclasses
import importlib.util
import os
from importlib import metadata
from typing import Any, Literal, Protocol, runtime_checkable

from music_ar.model.config import Compute, ModelConfig
from music_ar.system import usable_cores

_ACCELERATOR_PACKAGES = ("jax_plugins", "libtpu")  # JAX's plugins for GPUs and others; its library for TPUs
_MAX_CPU_DEVICES = 16  # as many as a batch has rows
_YNNPACK_VERSION = (0, 12)  # of JAX: from this version, YNNPACK computes XLA's matrix products on CPUs
_CONCURRENT = (("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT"),)
_SEPARATE = (
    ("xla_gpu_dot_merger_threshold_mb", 0),
    ("xla_disable_hlo_passes", "gpu_horizontal_loop_fusion,gpu_horizontal_input_fusion"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """How to decode. The defaults are the plain reference, which runs anywhere.

    Attributes:
        compute: how the model computes.
        linear: form of the linear layers: "int8" matrices, which pay off where decoding is limited by reading weights
            from memory; "transposed" matrices with norms folded in, for GPUs; or "plain".
        int8_layout: how int8 matrices are stored: [in, out] or [out, in]. YNNPACK is faster with the latter.
        key_dtype: type of cached keys; None means the model's.
        attention: "plain" operations, or one "pallas" kernel per block; "interpreted" is that kernel run as ordinary
            operations, for tests.
        compiler_options: XLA options of the decoding loop.
        micro_batch_rows: from this number of rows, a step splits them into two overlapping micro-batches; None means
            never.
        micro_batch_options: XLA options, in addition to `compiler_options`, that keep micro-batches separate.
        max_chunk_tokens: largest number of tokens per row in a chunk of a stream.
        max_chunk_work: largest number of tokens over all rows in a chunk, so that a stream can be stopped soon; None
            means no limit.
        batch_rows: rows of a continuous batch; None means as many as fit in half of the free memory.
        batch_chunk_tokens: tokens per row in a chunk of a continuous batch. Short chunks waste less, since a finished
            row waits for the end of its chunk: for 400 pieces of 6 s in 16 rows, 94 % of the tokens were used with
            chunks of 16 tokens, 87 % with chunks of 64.
    """

    compute: Compute = Compute()
    linear: Literal["plain", "int8", "transposed"] = "plain"
    int8_layout: Literal["in_out", "out_in"] = "in_out"
    key_dtype: Literal["float32", "bfloat16"] | None = None
    attention: Literal["plain", "pallas", "interpreted"] = "plain"
    compiler_options: tuple[tuple[str, Any], ...] = ()
    micro_batch_rows: int | None = None
    micro_batch_options: tuple[tuple[str, Any], ...] = ()
    max_chunk_tokens: int = 64
    max_chunk_work: int | None = None
    batch_rows: int | None = None
    batch_chunk_tokens: int = 64

    def chunk_tokens(self, rows: int) -> int:
        """Tokens per row in a chunk of a stream with this number of rows."""
        if self.max_chunk_work is None:
            return self.max_chunk_tokens
        return max(1, min(self.max_chunk_tokens, self.max_chunk_work // rows))

    def micro_batches(self, rows: int) -> int:
        """Number of micro-batches of a step, given the rows on a device."""
        split = self.micro_batch_rows is not None and rows >= self.micro_batch_rows and rows % 2 == 0
        return 2 if split else 1

    def options(self, micro_batches: int) -> tuple[tuple[str, Any], ...]:
        """XLA options of the decoding loop."""
        return self.compiler_options + (self.micro_batch_options if micro_batches > 1 else ())

    def suited_to(self, config: ModelConfig) -> "Backend":
        """The same backend, without the attention kernel if it does not support the model's sizes."""
        if self.attention == "plain":
            return self
        from music_ar.decoding import pallas_attention

        if pallas_attention.suits(config):
            return self
        return dataclasses.replace(self, attention="plain", micro_batch_rows=None)


CPU = Backend(
    linear="int8",
    max_chunk_tokens=16,
    max_chunk_work=64,
    batch_rows=16,  # more rows gain little: reading the caches then takes longer than reading the weights
    batch_chunk_tokens=16,
)
"""What the native engine and JAX share on a CPU: lengths of chunks and sizes of batches."""


@runtime_checkable
class Device(Protocol):
    """The attributes that are read from a JAX device: `platform` and, on NVIDIA GPUs, `compute_capability`."""

    platform: str


def native() -> bool:
    """Whether the native engine decodes, and not JAX.

    JAX decodes on accelerators, where the engine was not compiled, and where the environment variable `MUSIC_AR_CPU` is
    "jax". JAX is imported to look for an accelerator only where a plugin for one is installed; the environment variable
    `JAX_PLATFORMS` = "cpu" says that there is none.
    """
    from music_ar.decoding.native import library

    return os.environ.get("MUSIC_AR_CPU") != "jax" and library.load() is not None and _on_a_cpu()


def _on_a_cpu() -> bool:
    """Whether JAX would decode on a CPU; found out without importing it, if possible."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    if not any(importlib.util.find_spec(package) for package in _ACCELERATOR_PACKAGES):
        return True
    import jax

    return jax.local_devices()[0].platform == "cpu"


def select(device: Device | None = None, jax_version: tuple[int, ...] | None = None) -> Backend:
    """The fastest known backend of JAX for a device.

    Args:
        device: default: JAX's first.
        jax_version: default: the installed one.
    """
    import jax

    chosen: Device = jax.local_devices()[0] if device is None else device
    if chosen.platform == "cpu":
        return _cpu(jax.__version_info__ if jax_version is None else jax_version)
    if chosen.platform == "gpu":
        return _gpu(getattr(chosen, "compute_capability", None))
    return Backend(compute=Compute(dtype="bfloat16"))


def _cpu(jax_version: tuple[int, ...]) -> Backend:
    ynnpack = jax_version >= _YNNPACK_VERSION
    return dataclasses.replace(
        CPU, int8_layout="out_in" if ynnpack else "in_out", key_dtype="bfloat16" if ynnpack else None
    )


def _gpu(compute_capability: str | None) -> Backend:
    # The kernel was measured on compute capability 9.0 only, and JAX's Triton backend for Pallas is deprecated.
    kernel = compute_capability == "9.0" and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    return Backend(
        compute=Compute(dtype="bfloat16", attention="cudnn"),
        linear="transposed",
        attention="pallas" if kernel else "plain",
        compiler_options=_CONCURRENT,
        micro_batch_rows=256 if kernel else None,
        micro_batch_options=_SEPARATE,
    )


def cpu_devices(*, many_rows: bool = False) -> int:
    """How many devices JAX should split the CPU into for decoding; to be set before JAX is imported.

    Rows of a batch are sharded over the devices. A step of few rows keeps about one core busy with JAX 0.10, and two
    with 0.12 (docs/results/decoding.md).

    Args:
        many_rows: whether batches have as many rows as there are cores.
    """
    major, minor = map(int, metadata.version("jax").split(".")[:2])
    cores_per_device = 2 if (major, minor) >= _YNNPACK_VERSION and not many_rows else 1
    return max(1, min(_MAX_CPU_DEVICES, usable_cores() // cores_per_device))


def prepare(*, many_rows: bool = False) -> None:
    """Set JAX up for decoding. Call it before JAX is imported.

    A CPU is split into `cpu_devices`, across which rows are sharded. For few rows, memory of a GPU is taken as it is
    needed: reserving most of it, as JAX does otherwise, takes 1.5 s.
    """
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cpu_devices(many_rows=many_rows)))
    if not many_rows:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
