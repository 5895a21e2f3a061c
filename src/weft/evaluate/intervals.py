"""Intervals for a table's cells, by resampling its examples. Pure functions over scores."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def resampled_means(values: np.ndarray, weights: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """The weighted mean of each bootstrap sample (Efron 1979): examples drawn with replacement, as many as there are.

        m_b = Σ_i n_bi v_i / Σ_i n_bi w_i        n_b ~ Multinomial(N, 1/N)

    Args:
        values: summed over each example, [example].
        weights: how much each example counts (its tokens), [example].
        seed: the same seed draws the same examples, so that two models' samples are paired.
        resamples: how many samples.

    Returns:
        [sample]

    Example:
        >>> resampled_means(np.array([1.0, 3.0]), np.ones(2), seed=0)
    """
    number = len(values)
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    return (counts @ values) / (counts @ weights)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap samples: this share of them lies in it."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
