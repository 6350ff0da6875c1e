"""How many windows can be scored at once, estimated before anything is compiled."""

import jax

from music_ar.model.config import Compute, ModelConfig
from music_ar.training.memory import BYTES, TOLERANCE, device_memory, gigabytes


class ScoringError(ValueError):
    """A model cannot be scored so; the message says why and what to do."""


def windows_at_once(model: ModelConfig, compute: Compute, context: int, latents: int, most: int) -> int:
    """Return how many windows fit in the free memory of the device, at most `most`.

    Raises:
        ScoringError: not even one does.
    """
    free = device_memory([jax.local_devices()[0]], free=True)
    needed = window_bytes(model, compute, context, latents)
    if free is None or most * needed <= free:
        return most
    if needed <= TOLERANCE * free:
        return max(1, free // needed)
    while context // 2 > latents and window_bytes(model, compute, context, latents) > free:
        context //= 2
    fits = window_bytes(model, compute, context, latents) <= free
    advice = f"What would fit: a context of {context:,} tokens" if fits else "Use fewer latents, or a smaller model"
    raise ScoringError(
        f"a window to score needs about {gigabytes(needed)} of memory, and the device has {gigabytes(free)} left. "
        f"{advice}"
    )


def window_bytes(model: ModelConfig, compute: Compute, context: int, latents: int) -> int:
    """Estimate the memory of one window: rows of the cross-attention, latents of one block, logits."""
    size, kv_width = BYTES[compute.dtype], 2 * model.kv_heads * model.head_size
    of_row = size * (2 * model.width + kv_width + model.feature_count // 2)
    of_latent = size * (4 * model.width + model.hidden) + 3 * 4 * model.vocabulary_size
    if compute.attention == "xla" and not model.segment:
        of_latent += 3 * 4 * model.heads * latents  # scores, in float32
    return model.attended(context) * of_row + latents * of_latent
