"""Time one decoding step without and with the GPU attention kernel, interleaved in one process.

    python benchmarks/decode_step.py [--preset small] [--batch 1 256] [--latents 1024] [--context 4096]
        [--attention plain pallas] [--kernels 20] [--tilings 1,128,4,3 16,64,4,3]

"plain" computes attention by ordinary operations, "pallas" by one kernel per block. The weights are random and none are
zero; the largest difference of the logits compares the two. If the kernel fails, its error is shown and the rest
continues. --kernels lists the device's kernels of one step by total time. --tilings times the attention kernel alone,
on the caches of one layer, for each tiling: splits, block, warps, stages. Prints a table and, last, one line of JSON.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from train_step import longest_kernels, timed

from music_ar.decoding import backend as backends
from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import shared_options
from music_ar.decoding.pallas_kernel import Heads, Tiling, attend
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.windows import cache_size
from music_ar.model.config import PRESETS, ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary

WAYS = ("plain", "pallas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--attention", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per timed chunk")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=20, help="number of kernels to list; 0 for none")
    parser.add_argument("--tilings", nargs="*", default=[], metavar="SPLITS,BLOCK,WARPS,STAGES")
    parser.add_argument("--gb-per-s", type=float, default=3000, help="nominal memory bandwidth")
    arguments = parser.parse_args()

    config = dataclasses.replace(PRESETS[arguments.preset], context=arguments.context)
    model = random_model(config)
    table = Table(
        "batch", "attention", "tokens/s", "us per step", "MB read", "share of the limit", "logits differ by, of std"
    )
    rows: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    for batch in arguments.batch:
        rows += compare_ways(model, batch, arguments)
        for given in arguments.tilings:
            splits, block, warps, stages = map(int, given.split(","))
            tiling = Tiling(splits=splits, block=block, warps=warps, stages=stages)
            alone.append(time_alone(config, model.dtype, batch, cache_size(arguments.latents), tiling))
    Console().print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {model.dtype}")
    for row in rows:
        cells = [row["batch"], row["attention"], row["tokens_per_s"], row["step_us"], row["read_mb"]]
        share = None if row["share_of_limit"] is None else f"{row['share_of_limit']:.1%}"
        table.add_row(*("-" if cell is None else str(cell) for cell in (*cells, share, row["logits_differ"])))
    Console().print(table)
    for row in alone:
        print(row)
    device = jax.devices()[0].device_kind
    print(json.dumps({"benchmark": "decode_step", "device": device, **vars(arguments), "rows": rows, "alone": alone}))


def random_model(config: ModelConfig) -> PerceiverAR:
    """A model with random weights everywhere, whose pieces do not end."""
    model = PerceiverAR(config, rngs=nnx.Rngs(0), compute=backends.select().compute)
    params = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape) / max(leaf.shape[0], 1) ** 0.5
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(tree, noisy))
    assert model.head.bias is not None
    model.head.bias[...] = model.head.bias[...].at[vocabulary.END].set(-1e4)
    return model


def backend_with(attention: str) -> Backend:
    """This device's backend, with this attention."""
    chosen = backends.select()
    if attention == "plain":  # micro-batches pay with the kernel only
        return dataclasses.replace(chosen, attention="plain", micro_batch_rows=None)
    return dataclasses.replace(chosen, attention="pallas")


def compare_ways(model: PerceiverAR, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A result for each way of attention, timed interleaved. If a way fails, its result is the error."""
    runs: dict[str, Callable[[], None]] = {}
    results: dict[str, dict[str, Any]] = {}
    logits: dict[str, np.ndarray] = {}
    for name in arguments.attention:
        empty = dict.fromkeys(("tokens_per_s", "step_us", "read_mb", "share_of_limit", "logits_differ", "error"))
        results[name] = {"batch": batch, "attention": name, **empty}
        try:
            runs[name], logits[name], results[name]["read_mb"] = runner(model, backend_with(name), batch, arguments)
        except Exception as error:  # the other way can still be timed
            traceback.print_exc()
            results[name]["error"] = f"{type(error).__name__}: {error}"[:500]
    if len(logits) == len(WAYS):
        differ = float(np.abs(logits["plain"] - logits["pallas"]).max())
        results["pallas"]["logits_differ"] = f"{differ:.2g} of {float(logits['plain'].std()):.2g}"
    spent_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.chunks):
        for name, run in runs.items():
            spent_s[name].append(timed(run))
    for name, seconds in spent_s.items():
        step_s, result = statistics.median(seconds) / arguments.tokens, results[name]
        result["tokens_per_s"], result["step_us"] = round(batch / step_s), round(step_s * 1e6, 1)
        result["share_of_limit"] = round(result["read_mb"] * 1e6 / (arguments.gb_per_s * 1e9) / step_s, 4)
    if arguments.kernels:
        for name, run in runs.items():
            print(f"\nKernels of a step, batch {batch}, attention: {name}, step {results[name]['step_us']} us")
            list_kernels(run, arguments)
    return list(results.values())


def runner(
    model: PerceiverAR, backend: Backend, batch: int, arguments: argparse.Namespace
) -> tuple[Callable[[], None], np.ndarray, float]:
    """A function that decodes a chunk, the logits of eight given tokens, and the megabytes that a step must read."""
    decoder = Decoder(model, backend)
    note = [vocabulary.NOTE_ON + 60, vocabulary.TIME_SHIFT + 19, vocabulary.NOTE_OFF + 60, vocabulary.TIME_SHIFT + 9]
    prompt = np.resize(note, model.config.context + 8).astype(np.int32)
    prompt[:2] = vocabulary.START, vocabulary.VELOCITY + 15

    start = functools.partial(decoder.start, latents=arguments.latents, limit_steps=2**30)
    given = np.tile(prompt[-8:], (batch, 1))
    _, logits_BxTxV = decoder.teacher_force(start([prompt] * batch, seeds=range(batch)), given)
    state = start([prompt] * batch, seeds=range(batch))
    options = shared_options(SamplingOptions())

    def run() -> None:
        nonlocal state
        state, tokens = decoder.decode(state, options, length=arguments.tokens)
        jax.block_until_ready(tokens)

    run()  # compiles
    run()
    read = sum(leaf.nbytes for leaf in jax.tree.leaves((decoder.params, state.caches, state.notes, state.match)))
    return run, np.asarray(logits_BxTxV)[..., : vocabulary.EVENT_CLASSES], round(read / 1e6, 1)


def list_kernels(run: Callable[[], None], arguments: argparse.Namespace) -> None:
    """Print the kernels of a step by total time, or why there is no profile."""
    tokens = arguments.tokens
    try:
        found = list(longest_kernels(run, 100_000))
    except Exception as error:
        print(f"no profile: {type(error).__name__}: {error}")
        return
    count, spent_ms = sum(times for _, times, _ in found), sum(milliseconds for *_, milliseconds in found)
    print(f"{spent_ms / tokens * 1e3:8.2f} us  {count / tokens:6.1f} x  all of {len(found)}")
    for name, times, milliseconds in found[: arguments.kernels]:
        print(f"{milliseconds / tokens * 1e3:8.2f} us  {times / tokens:6.1f} x  {name[:90]}")


def time_alone(config: ModelConfig, dtype: jnp.dtype, batch: int, size: int, tiling: Tiling) -> dict[str, Any]:
    """Microseconds of the kernel on the caches of one layer, from loops of two lengths."""
    result: dict[str, Any] = {"batch": batch, "cache_size": size, **dataclasses.asdict(tiling)}
    H, G, K = config.heads, config.kv_heads, config.head_size
    heads = jax.random.normal(jax.random.key(0), (batch, H + 2 * G, K)).astype(dtype)
    cache = jnp.zeros((batch * G, size, K), dtype)
    slots = jnp.tile(jnp.array([[5, size - 1]], jnp.int32), (batch, 1))
    rotations = jnp.ones((batch, 2 if config.time_heads else 1, 2, K))
    scale = jnp.ones((H + G, K))

    @functools.partial(jax.jit, donate_argnums=(1, 2), static_argnums=3)
    def loop(heads: Any, k: Any, v: Any, times: int) -> Any:
        def once(_: Any, carry: Any) -> Any:
            heads, k, v, counters = carry
            found, k, v, counters = attend(
                Heads(heads, 0, scale),
                Heads(heads, H, scale, H),
                Heads(heads, H + G),
                k,
                v,
                slots,
                rotations,
                counters,
                config=config,
                tiling=tiling,
            )
            return heads.at[:, :H].set(found), k, v, counters  # so that each waits for the previous one

        return jax.lax.fori_loop(0, times, once, (heads, k, v, jnp.zeros(batch * G, jnp.int32)))

    def seconds(times: int) -> float:
        def run() -> None:
            jax.block_until_ready(loop(heads, jnp.copy(cache), jnp.copy(cache), times))

        run()
        return statistics.median(timed(run) for _ in range(9))

    try:
        one_s = (seconds(220) - seconds(20)) / 200
    except Exception as error:
        return result | {"error": f"{type(error).__name__}: {error}"[:500]}
    return result | {"us_with_a_copy": round(one_s * 1e6, 2), "gb_per_s": round(2 * cache.nbytes / one_s / 1e9)}


if __name__ == "__main__":
    main()
