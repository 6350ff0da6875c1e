"""Windows of latents: how decoding continues once a piece has more tokens than there are latents.

"sliding", the default: a window that drops its oldest latent. Training never does that (it computes the latent at time
t in a window that begins at a fixed time s). But on real music, sliding windows predict as well or better, because each
prediction has n latents behind it, and they take half the work.

"exact": re-anchored windows, which compute what training computes, without a stall; the tests use them as a reference.
Two windows run side by side, staggered by n / 2. Each restarts every n tokens, so one of them always holds n / 2 to n
latents, and that one makes the prediction:

    time      0      n/2      n      3n/2     2n
    window 0  [---------------)[---------------)
    window 1         [---------------)[-----------
    predicts  0       0       1       0       1

`evaluation.likelihood.score_decoding` measures what each costs in likelihood (docs/results/decoding.md).
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

WindowMode = Literal["sliding", "exact"]
WINDOWS: dict[WindowMode, int] = {"sliding": 1, "exact": 2}
"""W, the number of windows of each mode."""
NEVER = np.int32(2**30)
"""Start of a window that has not begun."""


def window_starts(
    age_B: Int[Array, " B"], latents_B: Int[Array, " B"], windows: int
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """Start of each window that holds the latent at this position, and number of the one that predicts.

    A single window (sliding) began n - 1 tokens ago. Of two (exact), window 0 begins at even multiples of n / 2, and
    window 1 at odd ones; before n / 2, window 1 has not begun.

    Args:
        age_B: position of the latent in its piece.
        latents_B: n.
        windows: W.
    """
    if windows == 1:
        return jnp.maximum(age_B - latents_B + 1, 0)[:, None], jnp.zeros_like(age_B)
    half_B = latents_B // 2
    count_B = age_B // half_B
    numbers_Bx2 = count_B[:, None] - (count_B[:, None] - jnp.arange(2)[None]) % 2
    starts_Bx2 = jnp.where(numbers_Bx2 >= 0, numbers_Bx2 * half_B[:, None], NEVER)
    return starts_Bx2, jnp.where(count_B == 0, 0, (count_B + 1) % 2)
