"""Expansion of a trained model into a larger one that computes the same function until it is trained further.

"Net2Net" (Chen et al., ICLR 2016) copies channels for this. Here the new parameters have no effect at first. New
weights that write to the residual stream are zero, as in a new block, so new channels of the stream carry nothing, and
new heads, hidden channels and blocks add nothing. New weights that read are random, which gives the others gradients.
New tokens are copies of `START`, which a trained model never predicts.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary

_SIZES = ("width", "layers", "heads", "kv_heads", "time_heads", "hidden", "vocabulary_size")


class _Rule(NamedTuple):
    """How a parameter is expanded.

    Attributes:
        axes: for each axis, the `ModelConfig` size that it grows with; None if it keeps its length.
        new: values of the new entries. "norm": those of a new norm, and all entries are scaled for the larger width.
    """

    axes: tuple[str | None, ...]
    new: Literal["zero", "random", "norm"]


_WIDTH_NORM = _Rule(("width",), "norm")
_RULES = {
    "embedding": _Rule(("vocabulary_size", "width"), "zero"),
    "conv": _Rule((None, "width"), "zero"),
    "keyboard.kernel": _Rule((None, "width"), "zero"),
    "retrieval.kernel": _Rule((None, "width"), "zero"),
    "gap.kernel": _Rule((None, "width"), "zero"),
    "label.kernel": _Rule((None, "width"), "zero"),
    "wishes.kernel": _Rule((None, "width"), "zero"),
    "context_norm.scale": _WIDTH_NORM,
    "latent.kernel": _Rule(("width", "width"), "zero"),
    # Of the cross block and of each self block:
    "attention_norm.scale": _WIDTH_NORM,
    "query.kernel": _Rule(("width", "heads"), "random"),
    "query_norm.scale": _Rule((None,), "random"),
    "key.kernel": _Rule(("width", "kv_heads"), "random"),
    "key_norm.scale": _Rule((None,), "random"),
    "value.kernel": _Rule(("width", "kv_heads"), "random"),
    "output.kernel": _Rule(("heads", "width"), "zero"),
    "feed_forward_norm.scale": _WIDTH_NORM,
    "expand.kernel": _Rule(("width", "hidden"), "random"),
    "contract.kernel": _Rule(("hidden", "width"), "zero"),
    "final_norm.scale": _WIDTH_NORM,
    "head.kernel": _Rule(("width", "vocabulary_size"), "random"),
    "head.bias": _Rule(("vocabulary_size",), "random"),
    "exit_costs.kernel": _Rule(("width", None), "zero"),
    "exit_costs.bias": _Rule((None,), "zero"),
}


def expand(model: PerceiverAR, config: ModelConfig, *, rngs: nnx.Rngs) -> PerceiverAR:
    """Return a model of a larger `config` that computes what `model` does, except for rounding.

    Args:
        model: the trained model; it is not changed, and is returned itself if it already has this config.
        config: the model's, except that width, layers, heads, kv_heads, time_heads, hidden and vocabulary_size may be
            larger, with the same number of query heads per key/value head, label_size and wishes may be set if there
            were none, and exits may be any.
        rngs: for the random parameters.

    Raises:
        ValueError: `config` differs in another way.
    """
    if config == model.config:
        return model
    _check(model.config, config)
    larger = PerceiverAR(config, rngs=rngs, compute=model.compute)
    channels = _old_channels(model.config, config)
    trained = {path: np.asarray(old[...]) for path, old in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if config.exits != model.config.exits:
        trained = {path: old for path, old in trained.items() if path[0] != "exit_costs"}
    parameters = {
        path: fresh.replace(_expanded(_RULES[_rule_name(path)], trained[path], np.asarray(fresh[...]), channels))
        if path in trained
        else fresh
        for path, fresh in nnx.to_flat_state(nnx.state(larger, nnx.Param))
    }
    nnx.update(larger, nnx.from_flat_state(parameters))
    return larger


def _check(old: ModelConfig, new: ModelConfig) -> None:
    """Raise ValueError unless `old` can be expanded to `new`."""
    if old.tape is not None:
        raise ValueError("a model with a tape cannot be expanded")
    differing = [
        field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name)
    ]
    # What the old model lacks may be added: it begins with zeros.
    allowed = {*_SIZES, "exits", *(name for name in ("label_size", "wishes") if not getattr(old, name))}
    if not old.is_music:
        allowed.remove("vocabulary_size")  # new tokens begin as copies of START, which it does not have
    larger = all(getattr(new, name) >= getattr(old, name) for name in _SIZES)
    larger = larger and new.kv_heads - new.time_heads >= old.kv_heads - old.time_heads
    if not (larger and allowed.issuperset(differing) and new.heads // new.kv_heads == old.heads // old.kv_heads):
        changes = ", ".join(f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in differing)
        raise ValueError(
            f"cannot expand the model: only {', '.join(_SIZES)} may increase, with the same number of query heads per "
            f"key/value head, exits may change, wishes from None and label_size from 0; differing sizes: {changes}"
        )


def _old_channels(old: ModelConfig, new: ModelConfig) -> dict[str, np.ndarray]:
    """Return the places of the old model's channels in the new one. The heads that count time stay last."""
    by_token = old.kv_heads - old.time_heads
    groups = np.concatenate([np.arange(by_token), new.kv_heads - new.time_heads + np.arange(old.time_heads)])

    def subdivide(starts: np.ndarray, count: int) -> np.ndarray:
        return (starts[:, None] * count + np.arange(count)[None]).reshape(-1)

    return {
        "width": np.arange(old.width),
        "hidden": np.arange(old.hidden),
        "heads": subdivide(subdivide(groups, old.heads // old.kv_heads), old.head_size),
        "kv_heads": subdivide(groups, old.head_size),
        "vocabulary_size": np.arange(new.vocabulary_size),  # with the new tokens, see `_with_new_tokens`
    }


def _rule_name(path: tuple[Any, ...]) -> str:
    """Return a parameter's key in `_RULES`: its path, without the block that it belongs to."""
    inside = {"cross": 1, "blocks": 2}.get(path[0], 0)
    return ".".join(map(str, path[inside:]))


def _expanded(rule: _Rule, trained: np.ndarray, fresh: np.ndarray, channels: dict[str, np.ndarray]) -> Array:
    """Return a larger parameter with the trained values in their places."""
    if rule.new == "norm":
        # The mean square is now taken over more channels, and the new ones are zero.
        shrinking = math.sqrt(len(trained) / len(fresh))
        trained, fresh = trained * shrinking, fresh * shrinking
    trained = _with_new_tokens(rule, trained, channels)
    sizes = zip(rule.axes, trained.shape, strict=True)
    larger = np.zeros_like(fresh) if rule.new == "zero" else fresh.copy()
    larger[np.ix_(*(np.arange(size) if axis is None else channels[axis] for axis, size in sizes))] = trained
    return jnp.asarray(larger)


def _with_new_tokens(rule: _Rule, trained: np.ndarray, channels: dict[str, np.ndarray]) -> np.ndarray:
    """Return a trained parameter with the entries of new tokens: copies of those of `START`."""
    if "vocabulary_size" not in rule.axes:
        return trained
    axis = rule.axes.index("vocabulary_size")
    tokens = channels["vocabulary_size"]
    return np.take(trained, np.where(tokens < trained.shape[axis], tokens, vocabulary.START), axis=axis)
