"""Windows of latents: what happens once a piece has more tokens than there are latents.

"sliding": a window that forgets its oldest latent. Training never did that (it computes the latent at time t in a
window that begins at a fixed time s), but on real music it predicts as well or better, because it always has n latents
behind it, and for half the work. It is what people use.

"exact": re-anchored windows, which compute what training computes, without a stall; the oracle of the tests. Two
windows run side by side, staggered by n / 2. Each begins anew every n tokens, so one of them always holds n / 2 to n
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
"""The start of a window that has not begun."""


def window_starts(
    age_B: Int[Array, " B"], latents_B: Int[Array, " B"], windows: int
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """When the windows that hold the latent at this position began, and which of them predicts.

    A single one (sliding) begins n - 1 tokens ago. Of two (exact), window w begins at the multiples of n / 2 whose
    number is even (w = 0) or odd (w = 1); before n / 2, window 1 has not begun.

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
