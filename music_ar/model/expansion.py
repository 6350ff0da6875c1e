"""Growing a trained model into a larger one that computes the same until it is trained on.

"Net2Net" (Chen et al., ICLR 2016) does so by copying channels. Here what is new is silent instead: what writes into the
residual stream has zeros there, as blocks have at the start of training, so new channels of the stream carry nothing
yet, and new heads, hidden channels and blocks add nothing; what reads them is random, which gives them gradients.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR

_SIZES = ("width", "layers", "heads", "kv_heads", "time_heads", "hidden")
_WRITERS = ("embedding", "conv", "keyboard", "recall", "view", "latent", "output", "contract")
_AXES: dict[str, tuple[str | None, str | None]] = {  # of a leaf; None stays. Of all others only the last one grows
    "latent": ("width", "width"),
    "query": ("width", "heads"),
    "key": ("width", "kv_heads"),
    "value": ("width", "kv_heads"),
    "output": ("heads", "width"),
    "expand": ("width", "hidden"),
    "contract": ("hidden", "width"),
    "head": ("width", None),
}


def grown(model: PerceiverAR, config: ModelConfig, *, rngs: nnx.Rngs) -> PerceiverAR:
    """A model of `config` that computes what `model` does, but for rounding; `model` itself if that is its config.

    Args:
        model: is left as it is.
        config: as the model's, but that width, layers, heads, kv_heads, time_heads and hidden may be larger, with as
            many query heads to a key/value head, and that there may be a view_size where there was none.
        rngs: for what is random.

    Raises:
        ValueError: `config` differs in another way.
    """
    if config == model.config:
        return model
    _check(model.config, config)
    larger = PerceiverAR(config, rngs=rngs, dtype=model.dtype)
    places = _places(model.config, config)
    trained = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    leaves = {
        path: leaf.replace(_placed(path, trained[path][...], leaf[...], places)) if path in trained else leaf
        for path, leaf in nnx.to_flat_state(nnx.state(larger, nnx.Param))
    }
    nnx.update(larger, nnx.from_flat_state(leaves))
    return larger


def _check(old: ModelConfig, new: ModelConfig) -> None:
    may_differ = (*_SIZES, "view_size") if old.view_size == 0 else _SIZES
    same = dataclasses.replace(old, **{name: getattr(new, name) for name in may_differ}) == new
    larger = all(getattr(new, name) >= getattr(old, name) for name in _SIZES)
    larger = larger and new.kv_heads - new.time_heads >= old.kv_heads - old.time_heads
    if not (same and larger and new.heads // new.kv_heads == old.heads // old.kv_heads):
        raise ValueError(
            f"a model can grow in {', '.join(_SIZES)}, if each key/value head serves as many query heads as before, "
            f"and be told views if it was not; it is {old}, and cannot become {new}"
        )


def _places(old: ModelConfig, new: ModelConfig) -> dict[str, np.ndarray]:
    """Where the channels of the old model come to lie. The heads that count time stay the last ones."""
    by_token = old.kv_heads - old.time_heads
    groups = np.concatenate([np.arange(by_token), new.kv_heads - new.time_heads + np.arange(old.time_heads)])

    def each(starts: np.ndarray, count: int) -> np.ndarray:
        return (starts[:, None] * count + np.arange(count)[None]).reshape(-1)

    return {
        "width": np.arange(old.width),
        "hidden": np.arange(old.hidden),
        "heads": each(each(groups, old.heads // old.kv_heads), old.head_size),
        "kv_heads": each(groups, old.head_size),
    }


def _placed(path: tuple[Any, ...], trained: Array, fresh: Array, places: dict[str, np.ndarray]) -> Array:
    """A larger leaf with the trained values in their places."""
    name = path[-2] if path[-1] in ("kernel", "scale") else path[-1]
    if path[-1] == "bias" or name in ("query_norm", "key_norm"):
        return trained
    if path[-1] == "scale":
        # The mean square is one of more channels now, and the new ones are zero.
        shrinking = math.sqrt(len(trained) / len(fresh))
        return (fresh * shrinking).at[places["width"]].set(trained * shrinking)
    sizes = zip(_AXES.get(name, (None, "width")), trained.shape, strict=True)
    index = np.ix_(*(np.arange(size) if axis is None else places[axis] for axis, size in sizes))
    return (jnp.zeros_like(fresh) if name in _WRITERS else fresh).at[index].set(trained)
