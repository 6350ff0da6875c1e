"""A plain reference implementation of Perceiver AR: dense masks, float64, no tricks."""

import numpy as np
from flax import nnx

from music_ar.features import keyboard, notes, retrieval
from music_ar.features.categorical import one_hot
from music_ar.model.config import ModelConfig

SMALL = ModelConfig(
    context=16,
    latents=8,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    hidden=20,
    conv_width=3,
    onsets=2,
    time_heads=1,
)
"""A small model with everything that changes how it attends."""


def keyboard_features(state, onsets):
    """The keyboard and the last notes as the numbers that the model's projection multiplies."""
    channels = keyboard.channels(state)
    return channels.__array_namespace__().concatenate(
        [channels, one_hot(notes.categories(onsets, state.time))], axis=-1
    )


def retrieval_features(retrieved):
    """What is retrieved as the numbers that the model's projection multiplies."""
    return one_hot(retrieval.categories(retrieved))


def parameters(model):
    """Parameters by their dotted names, in float64."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in flat}


def reference(model, tokens, latents, positions=None):
    """Logits [N, V] of one row of tokens, by the paper's formulas.

    `positions` are the inputs that the cross-attention may see; by default all.
    """
    config = model.config
    all_tokens = np.asarray(tokens)
    tokens = all_tokens[-config.attended(len(all_tokens)) :]
    keyboards = keyboard.scan_each(tokens)
    params = parameters(model)
    positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    queries = np.arange(len(tokens))[-latents:]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params[f"{name}.scale"]

    def heads(x, name, at):
        """Normalized and rotated heads."""
        x = norm(x.reshape(len(x), -1, config.head_size), name)
        half = config.rotary_size // 2
        rate = config.rotary_wavelength ** -np.linspace(0, 1, half)
        by_time = np.arange(x.shape[1]) >= x.shape[1] // config.kv_heads * (config.kv_heads - config.time_heads)
        position = np.where(by_time, keyboards.time[at][:, None], at[:, None])
        rotated = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * position[..., None] * rate)
        return np.concatenate([rotated.real, rotated.imag, x[..., 2 * half :]], axis=-1)

    def keys_values(x, name, at):
        k = heads(x @ params[f"{name}.key.kernel"], f"{name}.key_norm", at)
        v = (x @ params[f"{name}.value.kernel"]).reshape(k.shape)
        group = config.heads // config.kv_heads
        return np.repeat(k, group, axis=1), np.repeat(v, group, axis=1), at

    def block(x, name, context):
        k, v, at = context
        q = heads(norm(x, f"{name}.attention_norm") @ params[f"{name}.query.kernel"], f"{name}.query_norm", queries)
        scores = np.einsum("qhk,shk->hqs", q, k) / np.sqrt(config.head_size)
        visible = at[None] <= queries[:, None]
        if config.segment:  # the position's own segment and the one before
            visible &= at[None] // config.segment >= queries[:, None] // config.segment - 1
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqs,shk->qhk", weights / weights.sum(-1, keepdims=True), v)
        x = x + attended.reshape(latents, -1) @ params[f"{name}.output.kernel"]
        hidden = norm(x, f"{name}.feed_forward_norm") @ params[f"{name}.expand.kernel"]
        return x + np.maximum(hidden, 0) ** 2 @ params[f"{name}.contract.kernel"]

    embedded = looked_up = params["embedding"][tokens]
    for back in range(config.conv_width if config.conv_width > 1 else 0):
        shifted = np.concatenate([np.zeros((back, config.width)), looked_up])[: len(tokens)]
        embedded = embedded + shifted * params["conv"][back]
    if config.onsets:
        onsets = notes.scan_each(tokens, config.onsets)
        embedded = embedded + keyboard_features(keyboards, onsets) @ params["keyboard.kernel"]
    if config.retrieval_notes:
        retrieved = retrieval.scan_each(all_tokens, config.retrieval_notes, last=len(tokens))
        embedded = embedded + retrieval_features(retrieved) @ params["retrieval.kernel"]
    context = keys_values(norm(embedded[positions], "context_norm"), "cross", positions)
    x = block(embedded[queries] @ params["latent.kernel"], "cross", context)
    for depth in range(config.layers):
        name = f"blocks.{depth}"
        x = block(x, name, keys_values(norm(x, f"{name}.attention_norm"), name, queries))
    return norm(x, "final_norm") @ params["head.kernel"] + params["head.bias"]
