"""Draw sequences of any vocabulary, such as bytes or pixels, from a model.

Each token takes a forward pass over the whole window, as in training: no caches, no grammar. That is enough for short
sequences and small models; `Decoder` is for music.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from music_ar.decoding.interface import check_generates
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens.vocabulary import check_tokens


def draw_sequences(
    model: PerceiverAR, prompts_BxP: Int[np.ndarray, "B P"], length: int, *, seed: int, temperature: float = 1.0
) -> Int[np.ndarray, "B length"]:
    """Draw the tokens that continue each prompt. Padding is never drawn.

    Args:
        model: the model.
        prompts_BxP: at least one token each; shorter ones are left-padded with `ModelConfig.pad`.
        length: number of tokens to draw.
        seed: of the random numbers.
        temperature: divides the logits; 0 takes the likeliest token.

    Raises:
        GenerationError: the model does not generate.
        ValueError: there is no token to continue from, or one is outside of the vocabulary.
    """
    config = model.config
    check_generates(config)
    if prompts_BxP.shape[1] == 0 or (prompts_BxP[:, -1] == config.pad).any():
        raise ValueError("each prompt needs a token to continue from, and padding before it, not after it")
    check_tokens(prompts_BxP, config.vocabulary_size)
    missing = max(0, config.window - prompts_BxP.shape[1])
    window_BxM = np.pad(prompts_BxP, ((0, 0), (missing, 0)), constant_values=config.pad)[:, -config.window :]
    graph, params = nnx.split(model, nnx.Param)
    # At a temperature of almost 0, everything but the likeliest is infinitely far below it.
    drawn = _draw(graph, length, params, window_BxM, jax.random.key(seed), jnp.maximum(temperature, 1e-6))
    return np.asarray(drawn)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(
    graph: nnx.GraphDef[PerceiverAR],
    length: int,
    params: nnx.State,
    window_BxM: Array,
    key: Array,
    temperature: Array,
) -> Int[Array, "B length"]:
    model = nnx.merge(graph, params)

    def one_token(window_BxM: Array, key: Array) -> tuple[Array, Array]:
        logits_BxV = model(window_BxM)[:, -1].at[:, model.config.pad].set(-jnp.inf)
        token_B = jax.random.categorical(key, logits_BxV / temperature).astype(jnp.int32)
        return jnp.concatenate([window_BxM[:, 1:], token_B[:, None]], axis=1), token_B

    _, drawn_LxB = jax.lax.scan(one_token, jnp.asarray(window_BxM, jnp.int32), jax.random.split(key, length))
    return drawn_LxB.T
