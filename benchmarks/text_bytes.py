"""Text byte by byte, forwards, backwards and shuffled: nats a byte of held-out text, and some that is drawn.

    python benchmarks/text_bytes.py --output text [--steps 600] [--seeds 0 1] [--orders forwards backwards shuffled]

The documentation strings of Python's standard library, 1.6 MB, every 16th held out. A marker before each block of 16
bytes, to which the convolution reaches back, says in any order where a byte stands; it is not scored. "shuffled" is one
permutation of the bytes of every block. Prints a line of JSON for the references and for each model.
"""

import argparse
import ast
import lzma
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from any_order import nats_per_symbol, report, trained
from jaxtyping import Int

from music_ar.decoding.any_sequence import draw_sequences
from music_ar.model.config import ModelConfig

BYTES, BLOCK, HELD_OUT_BYTES = 256, 16, 2**15
MARKER, PADDING = BYTES, BYTES + 1
CONFIG = ModelConfig(
    vocabulary_size=PADDING + 1, padding=PADDING, context=16 * (BLOCK + 1), latents=4 * (BLOCK + 1),
    conv_width=BLOCK + 1, width=96, layers=2, heads=4, kv_heads=4, head_size=24, hidden=288,
)  # fmt: skip
OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}  # folders that are left out
ORDERS = {
    "forwards": np.arange(BLOCK),
    "backwards": np.arange(BLOCK)[::-1],  # of whole texts, see `written`
    "shuffled": np.random.default_rng(0).permutation(BLOCK),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    arguments = parser.parse_args()
    texts = list(dict.fromkeys(documentation()))
    train = "\n\n".join(text for number, text in enumerate(texts) if number % 16).encode()
    held_out = "\n\n".join(texts[::16]).encode()[:HELD_OUT_BYTES]
    sizes = {"train_bytes": len(train), "held_out_bytes": len(held_out)}
    report(benchmark="text_bytes", python=sys.version.split()[0], **sizes, **references(train, held_out))
    is_byte = np.arange(CONFIG.vocabulary_size) < BYTES
    for seed in arguments.seeds:
        for order in arguments.orders:
            folder = arguments.output / f"{order}-{seed}"
            model = trained(CONFIG, [written(train, order)], is_byte, arguments.steps, seed, folder)
            nats = nats_per_symbol(model, [written(held_out, order)], is_byte, CONFIG.latents // 4)
            report(order=order, seed=seed, steps=arguments.steps, nats_per_byte=nats)
            new = draw_sequences(model, written(held_out, order)[None, : 8 * (BLOCK + 1)], 24 * (BLOCK + 1), seed=seed)
            print(read(new[0], order).decode(errors="replace"), flush=True)


def documentation() -> Iterator[str]:
    """The documentation strings of the standard library's modules, without its tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if not OTHERS & {*path.relative_to(folder).parts}:
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def written(text: bytes, order: str) -> Int[np.ndarray, " T"]:
    """A text as tokens: each block of its bytes in an order, after a marker."""
    blocks = np.frombuffer(text[: len(text) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)[:, ORDERS[order]]
    blocks = blocks[::-1] if order == "backwards" else blocks
    return np.pad(blocks.astype(np.int32), ((0, 0), (1, 0)), constant_values=MARKER).ravel()


def read(tokens: Int[np.ndarray, " T"], order: str) -> bytes:
    """The text that whole blocks of tokens mean."""
    blocks = np.minimum(tokens.reshape(-1, BLOCK + 1)[:, 1:], BYTES - 1)[:, np.argsort(ORDERS[order])]
    return (blocks[::-1] if order == "backwards" else blocks).astype(np.uint8).tobytes()


def references(train: bytes, held_out: bytes) -> dict[str, float]:
    """Nats a byte by how often each byte occurs (plus one), and in LZMA files, alone and after the training text."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=BYTES) + 1
    unigram = -np.log(counts / counts.sum())[np.frombuffer(held_out, np.uint8)].mean()
    alone, of_train, of_both = (len(lzma.compress(text)) for text in (held_out, train, train + held_out))
    nats_a_byte = 8 * np.log(2) / len(held_out)
    return {
        "unigram": float(unigram),
        "lzma": nats_a_byte * alone,
        "lzma_after_train": nats_a_byte * (of_both - of_train),
    }


if __name__ == "__main__":
    main()
