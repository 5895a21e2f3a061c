"""Bootstrap intervals for the cells of a table, by resampling examples. Pure functions over scores."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def resampled_means(values: np.ndarray, weights: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """The weighted means of bootstrap samples (Efron 1979): N examples, drawn from N with replacement.

        m_b = Σ_i n_bi v_i / Σ_i n_bi w_i        n_b ~ Multinomial(N, 1/N)

    Args:
        values: sum of each example's scores, [example].
        weights: weight of each example, such as its number of tokens, [example].
        seed: random seed. The same seed draws the same examples, so that the samples of two models are paired.
        resamples: number of samples.

    Returns:
        The means, [sample].

    Example:
        >>> resampled_means(np.array([1.0, 3.0]), np.ones(2), seed=0)
    """
    number = len(values)
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    return (counts @ values) / (counts @ weights)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap samples, which contains the fraction `level` of them."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
