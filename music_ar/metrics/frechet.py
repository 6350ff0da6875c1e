"""Fréchet distance between two sets of embeddings, as of Gaussians: the Fréchet music distance.

For pieces of music it is what FID is for images and FAD for sound (Retkowski et al. 2024, "Frechet Music Distance: A
Metric For Generative Symbolic Music Evaluation").
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

FEWEST_GENERATED, FEWEST_REAL = 2, 4
"""Fewest pieces to compare: real ones are halved."""


class Gaussian(NamedTuple):
    """The Gaussian of a set of embeddings.

    Attributes:
        mean: [e].
        covariance: [e, e].
    """

    mean: Float64[np.ndarray, " e"]
    covariance: Float64[np.ndarray, "e e"]


def fit(embeddings: Float[np.ndarray, "n e"]) -> Gaussian:
    """Fit a Gaussian to embeddings.

    A set of a few hundred embeddings does not determine a covariance of thousands of numbers, so it is shrunk towards a
    multiple of the identity, by the share that oracle-approximating shrinkage finds (Chen et al. 2010, "Shrinkage
    Algorithms for MMSE Covariance Estimation"). The share falls to zero as the set grows.

    Raises:
        ValueError: there are fewer than two embeddings.
    """
    count, size = embeddings.shape
    if count < 2:
        raise ValueError(f"expected at least 2 embeddings, got {count}")
    exact = embeddings.astype(np.float64)
    mean = exact.mean(axis=0)
    centered = exact - mean
    covariance = centered.T @ centered / count
    level = np.trace(covariance) / size
    spread = (covariance**2).mean() - level**2 / size
    share = 1.0 if spread <= 0 else min(1.0, ((covariance**2).mean() + level**2) / ((count + 1) * spread))
    return Gaussian(mean, (1 - share) * covariance + share * level * np.eye(size))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Compute the Fréchet distance of two Gaussians, squared as usual: at least 0, and 0 if they are equal.

    It is the squared distance of the means, plus tr(A + B - 2 (A B)^(1/2)) for the covariances A and B. A B has the
    eigenvalues of the symmetric A^(1/2) B A^(1/2), so no square root of a general matrix is needed.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root).clip(0)).sum()
    apart = ((first.mean - second.mean) ** 2).sum()
    return max(0.0, float(apart + np.trace(first.covariance) + np.trace(second.covariance) - 2 * both))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrechetComparison:
    """How far generated music is from real music, beside how far real music is from other real music.

    Attributes:
        distance: between generated and real pieces.
        baseline: between as many real pieces and the same other real pieces.
        baseline_max: the largest baseline over all draws.
        pieces: number of pieces on each side of a draw.
    """

    distance: float
    baseline: float
    baseline_max: float
    pieces: int


def compare_embeddings(
    generated: Sequence[Float[np.ndarray, "_ e"]],
    real: Sequence[Float[np.ndarray, "_ e"]],
    *,
    draws: int = 20,
    seed: int = 0,
) -> FrechetComparison:
    """Compare the embeddings of generated and real pieces.

    Each draw splits the real pieces at random into two halves. The baseline is the distance between the halves; the
    distance is measured to the second half, from as many generated pieces as the first one has. Both are averaged over
    the draws. The distance of small sets is too large, whatever they hold; it is so on both sides, since all sets
    of a draw have the same number of pieces.

    Args:
        generated: the embeddings of the passages of each generated piece.
        real: those of each real piece.
        draws: number of draws.
        seed: random seed of the draws.

    Raises:
        ValueError: there are too few pieces.
    """
    if len(generated) < FEWEST_GENERATED or len(real) < FEWEST_REAL:
        raise ValueError(
            f"expected at least {FEWEST_GENERATED} generated and {FEWEST_REAL} real pieces, got {len(generated)} and "
            f"{len(real)}"
        )
    count = min(len(generated), len(real) // 2)
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(draws):
        order, chosen = random.permutation(len(real)), random.permutation(len(generated))[:count]
        side, other = (fit(_together(real, part)) for part in (order[:count], order[count : 2 * count]))
        pairs.append((frechet_distance(fit(_together(generated, chosen)), other), frechet_distance(side, other)))
    distances, baselines = np.array(pairs).T
    return FrechetComparison(
        distance=float(distances.mean()),
        baseline=float(baselines.mean()),
        baseline_max=float(baselines.max()),
        pieces=count,
    )


def _together(pieces: Sequence[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    return np.concatenate([pieces[number] for number in chosen])
