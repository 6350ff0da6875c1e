"""Perceiver AR written down plainly, to compare the real one with."""

import numpy as np
from flax import nnx

from music_ar.features import keyboard, retrieval


def keyboard_features(told, xp=np):
    """The keyboard as the numbers that the model's layer multiplies."""
    return xp.concatenate([keyboard.channels(told, xp), keyboard.one_hot(keyboard.classes(told, xp), xp)], axis=-1)


def recall_features(told, xp=np):
    """What is recalled as the numbers that the model's layer multiplies."""
    return keyboard.one_hot(retrieval.classes(told, xp), xp)


def reference(model, tokens, latents, positions=None):
    """Logits [N, V] of one row of tokens by the paper's formulas: dense masks, float64, no tricks.

    `positions` are the inputs that the cross-attention may see; by default all.
    """
    config = model.config
    all_tokens, tokens = tokens, tokens[-config.read(len(tokens)) :]
    weights = {
        ".".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    queries = np.arange(len(tokens))[-latents:]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.scale"]

    keyboards = keyboard.after_each(np.asarray(tokens), config.onsets)

    def heads(x, name, at):
        x = norm(x.reshape(len(x), -1, config.head_size), name)
        half = config.rotary_size // 2
        rate = config.rotary_wavelength ** -np.linspace(0, 1, half)
        by_time = np.arange(x.shape[1]) >= x.shape[1] // config.kv_heads * (config.kv_heads - config.time_heads)
        places = np.where(by_time, keyboards.step[at][:, None], at[:, None])
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * places[..., None] * rate)
        return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)

    def keys_values(x, name, at):
        k = heads(x @ weights[f"{name}.key.kernel"], f"{name}.key_norm", at)
        v = (x @ weights[f"{name}.value.kernel"]).reshape(k.shape)
        each = config.heads // config.kv_heads
        return np.repeat(k, each, axis=1), np.repeat(v, each, axis=1), at

    def block(x, name, context):
        k, v, at = context
        q = heads(norm(x, f"{name}.attention_norm") @ weights[f"{name}.query.kernel"], f"{name}.query_norm", queries)
        scores = np.einsum("qhk,shk->hqs", q, k) / np.sqrt(config.head_size)
        scores = np.where(at[None] <= queries[:, None], scores, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        found = np.einsum("hqs,shk->qhk", chances / chances.sum(-1, keepdims=True), v)
        x = x + found.reshape(latents, -1) @ weights[f"{name}.output.kernel"]
        hidden = norm(x, f"{name}.feed_forward_norm") @ weights[f"{name}.expand.kernel"]
        return x + np.maximum(hidden, 0) ** 2 @ weights[f"{name}.contract.kernel"]

    embedded = looked_up = weights["embedding"][tokens]
    for back in range(config.conv_width if config.conv_width > 1 else 0):
        moved = np.concatenate([np.zeros((back, config.width)), looked_up])[: len(tokens)]
        embedded = embedded + moved * weights["conv"][back]
    if config.onsets:
        embedded = embedded + keyboard_features(keyboards) @ weights["keyboard.kernel"]
    if config.recall:
        recalled = retrieval.after_each(all_tokens, config.recall, last=len(tokens))
        embedded = embedded + recall_features(recalled) @ weights["recall.kernel"]
    context = keys_values(norm(embedded[positions], "context_norm"), "cross", positions)
    x = block(embedded[queries] @ weights["latent.kernel"], "cross", context)
    for depth in range(config.layers):
        if depth in config.cross_depths:
            x = block(x, f"further_crosses.{config.cross_depths.index(depth)}", context)
        name = f"blocks.{depth}"
        x = block(x, name, keys_values(norm(x, f"{name}.attention_norm"), name, queries))
    return norm(x, "final_norm") @ weights["head.kernel"] + weights["head.bias"]
