"""Compare decoding speed with alternative models of the same size, interleaved in one run on the CPU.

    pip install -c requirements.lock . && pip install torch transformers einops fairscale gguf llama-cpp-py-sync
    pip install --no-deps --ignore-requires-python perceiver-io==0.11.0
    python benchmarks/peers.py

- music-ar: the shipped model, 4,096 tokens of context, 1,024 latents, int8 weights.
- perceiver-io 0.11 (Krasser and Stumpf; PyTorch): a Perceiver AR with its key/value cache, same widths and latents.
- llama.cpp, as llama-cpp-py-sync ships it (AVX2): a Llama of the same size in Q8_0 (int8), 2,048 past tokens.
- GPT-2 of Hugging Face's transformers (PyTorch): its cache, same width and depth, 2,048 past tokens.

The other models have random weights, which do not affect the time, and sample from the plain softmax. The models take
turns, so that noise slows all of them alike.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from llama_cpp_py_sync import _cffi_bindings as llama  # pyright: ignore[reportMissingImports]
from perceiver.model.core.config import CausalSequenceModelConfig  # pyright: ignore[reportMissingImports]
from perceiver.model.core.modules import CausalSequenceModel  # pyright: ignore[reportMissingImports]
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

from music_ar.decoding.interface import AnyDecoder, option_arrays
from music_ar.decoding.loading import load_decoder
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.config import ModelConfig
from music_ar.model.weights import parameter_shapes
from music_ar.system import usable_cores
from music_ar.tokens import vocabulary

# Decodes the next tokens, one after another.
Decode = Callable[[], None]


def music_ar(decoder: AnyDecoder, latents: int, batch: int, tokens: int) -> Decode:
    """This project's decoder, as `Generator` uses it."""
    options = option_arrays([SamplingOptions()] * batch)
    prompt = np.resize(np.array([vocabulary.NOTE_ON + 60, vocabulary.TIME_SHIFT + 19, vocabulary.NOTE_OFF + 60]), 4096)
    prompt[:2] = vocabulary.START, vocabulary.VELOCITY + 15
    prompts = [prompt.astype(np.int32)] * batch
    state = decoder.start(prompts, latents=latents, seeds=range(batch), limit_steps=2**30)

    def decode() -> None:
        nonlocal state
        state, new = decoder.decode(state, options, length=tokens)
        np.asarray(new)  # waits for them

    return decode


def perceiver_io(config: ModelConfig, latents: int, tokens: int) -> tuple[Decode, int]:
    """perceiver-io's model in its steady state: both caches are full, and each token drops the oldest entry."""
    model = CausalSequenceModel(
        CausalSequenceModelConfig(
            vocab_size=config.vocabulary_size,
            max_seq_len=config.context,
            max_latents=latents,
            num_channels=config.width,
            num_heads=config.heads,
            num_self_attention_layers=config.layers,
            num_self_attention_rotary_layers=-1,
        )
    ).eval()
    prefix = config.context - latents
    with torch.inference_mode():
        output = model(torch.randint(0, 388, (1, config.context)), prefix_len=prefix, kv_cache=[])
    token, cache = _draw(output.logits), output.kv_cache

    def decode() -> None:
        nonlocal token, cache
        with torch.inference_mode():
            for _ in range(tokens):
                kept = [config.context - 1, *[latents - 1] * config.layers]
                cache = [(k[:, -n:], v[:, -n:]) for (k, v), n in zip(cache, kept, strict=True)]
                output = model(token, prefix_len=prefix, kv_cache=cache)
                token, cache = _draw(output.logits), output.kv_cache

    return decode, sum(p.numel() for p in model.parameters())


def gpt2(config: ModelConfig, past: int, tokens: int) -> tuple[Decode, int]:
    """GPT-2 with `past` tokens in its cache at the start of each call."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary_size,
            n_positions=past + tokens + 1,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    cache = DynamicCache()
    with torch.inference_mode():
        token = _draw(model(torch.randint(0, 388, (1, past)), past_key_values=cache, use_cache=True).logits)

    def decode() -> None:
        nonlocal token
        if new := cache.get_seq_length() - past:
            cache.crop(-new)
        with torch.inference_mode():
            for _ in range(tokens):
                token = _draw(model(token, past_key_values=cache, use_cache=True).logits)

    return decode, sum(p.numel() for p in model.parameters())


def llama_cpp(config: ModelConfig, past: int, tokens: int) -> tuple[Decode, int]:
    """llama.cpp with `past` tokens in its cache at the start of each call, and its own sampler."""
    lib, ffi = llama.get_lib(), llama.get_ffi()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.gguf")
        parameters = _write_llama(path, config, past + tokens + 1)
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = past + tokens + 1, past, 512
    options.n_threads = options.n_threads_batch = usable_cores()
    context = lib.llama_init_from_model(model, options)
    sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(sampler, lib.llama_sampler_init_dist(1))
    prompt = ffi.new("llama_token[]", np.random.default_rng(0).integers(0, 388, past).tolist())
    assert lib.llama_decode(context, lib.llama_batch_get_one(prompt, past)) == 0
    token = ffi.new("llama_token[]", [lib.llama_sampler_sample(sampler, context, -1)])

    def decode() -> None:
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, past, -1)
        for _ in range(tokens):
            assert lib.llama_decode(context, lib.llama_batch_get_one(token, 1)) == 0
            token[0] = lib.llama_sampler_sample(sampler, context, -1)

    return decode, parameters


def _write_llama(path: Path, config: ModelConfig, context: int) -> int:
    """Write a Llama with random weights in Q8_0 and the sizes of `config`; return its number of parameters."""
    writer = gguf.GGUFWriter(path, "llama")
    D, F, V = config.width, config.hidden, config.vocabulary_size
    query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    writer.add_context_length(context)
    writer.add_embedding_length(D)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("none")
    block = {
        "attn_q": (query_width, D),
        "attn_k": (kv_width, D),
        "attn_v": (kv_width, D),
        "attn_output": (D, query_width),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    shapes = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,)}
    for layer in range(config.layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": (D,) for name in ("attn_norm", "ffn_norm")}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape, np.float32) * D**-0.5 if len(shape) == 2 else np.ones(shape, np.float32)
        if len(shape) == 2:
            quantized = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(math.prod(shape) for shape in shapes.values())


def _draw(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(torch.softmax(logits[:, -1], dim=-1), 1)


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    decoder = load_decoder()
    config, latents, tokens = decoder.config, arguments.latents, 32
    size = sum(map(math.prod, parameter_shapes(config).values()))
    ours, four = music_ar(decoder, latents, 1, tokens), music_ar(decoder, latents, 4, tokens)
    llama_decode, llama_size = llama_cpp(config, 2048, tokens)
    perceiver, perceiver_size = perceiver_io(config, latents, tokens)
    transformer, transformer_size = gpt2(config, 2048, tokens)
    tools = {
        "music-ar": (ours, tokens, size),
        "music-ar, four pieces at once": (four, 4 * tokens, size),
        "llama.cpp, Q8_0": (llama_decode, tokens, llama_size),
        "perceiver-io 0.11": (perceiver, tokens, perceiver_size),
        "GPT-2, transformers": (transformer, tokens, transformer_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for turn in range(arguments.rounds + 1):
        for name, (decode, _, _) in tools.items():
            began = time.perf_counter()
            decode()
            if turn:  # the first one compiles and warms up
                seconds[name].append(time.perf_counter() - began)
    rows = []
    print(f"{'':32}{'parameters':>12}{'tokens/s':>10}{'ours is':>10}")
    first = tokens / statistics.median(seconds["music-ar"])
    for name, (_, decoded, parameters) in tools.items():
        speed = decoded / statistics.median(seconds[name])
        print(f"{name:32}{parameters:12,}{speed:10.1f}{first / speed:9.1f}x")
        rows.append({"tool": name, "parameters": parameters, "tokens_per_s": speed})
    print(json.dumps({"latents": latents, "path": decoder.path, "rows": rows}))


if __name__ == "__main__":
    main()
