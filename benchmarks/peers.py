"""Compare decoding speed with alternative models of the same size, interleaved in one run on the CPU.

    pip install -c requirements.lock . && pip install torch transformers einops fairscale ctranslate2
    pip install --no-deps --ignore-requires-python perceiver-io==0.11.0
    python benchmarks/peers.py

- music-ar: the shipped model, 4,096 tokens of context, 1,024 latents, int8 weights.
- perceiver-io 0.11 (Krasser and Stumpf; PyTorch): a Perceiver AR with its key/value cache, same widths and latents.
- GPT-2 in CTranslate2 (C++, int8): the same model as the next, 2,048 past tokens.
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

import ctranslate2  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from ctranslate2.converters.transformers import GPT2Loader  # pyright: ignore[reportMissingImports]
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


def gpt2_model(config: ModelConfig, positions: int) -> GPT2LMHeadModel:
    """A GPT-2 of the same width and depth."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary_size,
            n_positions=positions,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def gpt2(model: GPT2LMHeadModel, past: int, tokens: int) -> Decode:
    """GPT-2 with `past` tokens in its cache at the start of each call."""
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

    return decode


def ctranslate(model: GPT2LMHeadModel, past: int, tokens: int) -> Decode:
    """A GPT-2 in CTranslate2, which keeps the keys and values of the `past` tokens between calls."""
    spec = GPT2Loader().get_model_spec(model)
    names = [str(token) for token in range(model.config.vocab_size)]
    spec.register_vocabulary(names)
    spec.validate()
    spec.optimize(quantization="int8")
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        generator = ctranslate2.Generator(folder, compute_type="int8", intra_threads=usable_cores())
    prompt = [names[token] for token in np.random.default_rng(0).integers(0, 388, past)]

    def decode() -> None:
        [result] = generator.generate_batch(
            [[names[0]]],
            static_prompt=prompt,
            include_prompt_in_result=False,
            min_length=tokens,
            max_length=tokens,
            sampling_topk=0,
            end_token=[],
        )
        assert len(result.sequences_ids[0]) == tokens

    return decode


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
    perceiver, perceiver_size = perceiver_io(config, latents, tokens)
    model = gpt2_model(config, 2048 + tokens + 1)
    gpt2_size = sum(p.numel() for p in model.parameters())
    tools = {
        "music-ar": (ours, tokens, size),
        "music-ar, four pieces at once": (four, 4 * tokens, size),
        "GPT-2, CTranslate2, int8": (ctranslate(model, 2048, tokens), tokens, gpt2_size),
        "perceiver-io 0.11": (perceiver, tokens, perceiver_size),
        "GPT-2, transformers": (gpt2(model, 2048, tokens), tokens, gpt2_size),
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
