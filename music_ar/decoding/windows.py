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

from typing import Any, Literal

import numpy as np
from jaxtyping import Int

WindowMode = Literal["sliding", "exact"]
WINDOWS: dict[WindowMode, int] = {"sliding": 1, "exact": 2}
"""W, the number of windows of each mode."""
NEVER = np.int32(2**30)
"""Start of a window that has not begun."""
_LEAST_CACHE = 8


def cache_size(latents: int) -> int:
    """R, slots of a rolling cache for a number of latents: the next power of two, so that many share a compilation."""
    return max(_LEAST_CACHE, 1 << (latents - 1).bit_length())


def window_starts(
    age_B: Int[Any, " B"], latents_B: Int[Any, " B"], windows: int
) -> tuple[Int[Any, "B W"], Int[Any, " B"]]:
    """Start of each window that holds the latent at this position, and number of the one that predicts.

    Takes NumPy or JAX arrays.

    A single window (sliding) began n - 1 tokens ago. Of two (exact), window 0 begins at even multiples of n / 2, and
    window 1 at odd ones; before n / 2, window 1 has not begun.

    Args:
        age_B: position of the latent in its piece.
        latents_B: n.
        windows: W.
    """
    xp = age_B.__array_namespace__()
    if windows == 1:
        return xp.maximum(age_B - latents_B + 1, 0)[:, None], xp.zeros_like(age_B)
    half_B = latents_B // 2
    count_B = age_B // half_B
    numbers_Bx2 = count_B[:, None] - (count_B[:, None] - xp.arange(2)[None]) % 2
    starts_Bx2 = xp.where(numbers_Bx2 >= 0, numbers_Bx2 * half_B[:, None], NEVER)
    return starts_Bx2, xp.where(count_B == 0, 0, (count_B + 1) % 2)
