"""Bayesian linear regression of quality on a configuration's features, for Thompson sampling.

Source: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, section 2.1; the two variances are those of
the largest evidence on a small grid (MacKay 1992, Bayesian Interpolation).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PRIOR_VARIANCES = (0.1, 0.3, 1.0)
"""Candidate prior variances of a weight, with features and qualities scaled to unit variance. Chosen: up to the
variance of the qualities, which are scaled to one."""

NOISE_VARIANCES = (0.03, 0.1, 0.3, 0.7)
"""Candidate noise variances of an observed quality, in the same scale. Chosen: part of that variance."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Posterior:
    """Gaussian posterior over the weights of standardized qualities."""

    mean: Floats
    """Shape [features + 1]; the first is the intercept."""
    root: Floats
    """Matrix square root of the covariance, shape [features + 1, features + 1]."""
    offset: float
    scale: float
    """A predicted quality is `offset + scale * features @ weights`."""

    def predict(self, features: Floats) -> Floats:
        """Return the expected qualities of rows of features."""
        return self.offset + self.scale * (_with_intercept(features) @ self.mean)

    def sample(self, features: Floats, generator: np.random.Generator) -> Floats:
        """Return the qualities of rows of features under one set of weights drawn from the posterior."""
        weights = self.mean + self.root @ generator.standard_normal(len(self.mean))
        return self.offset + self.scale * (_with_intercept(features) @ weights)


def fit(features: Floats, qualities: Floats) -> Posterior:
    """Fit the posterior to observed qualities.

    Args:
        features: shape [observations, features].
        qualities: shape [observations], finite; at least one.
    """
    offset = float(qualities.mean())
    scale = float(qualities.std()) or 1.0
    x, y = _with_intercept(features), (qualities - offset) / scale
    fitted = [_posterior(x, y, prior, noise) for prior, noise in itertools.product(PRIOR_VARIANCES, NOISE_VARIANCES)]
    _, mean, covariance = max(fitted, key=lambda each: each[0])
    values, vectors = np.linalg.eigh(covariance)
    return Posterior(mean, vectors * np.sqrt(np.clip(values, 0.0, None)), offset, scale)


def _posterior(x: Floats, y: Floats, prior: float, noise: float) -> tuple[float, Floats, Floats]:
    """Return the log evidence, mean and covariance under given variances."""
    gram = noise * np.eye(len(y)) + prior * (x @ x.T)
    gain = prior * np.linalg.solve(gram, x).T
    mean = gain @ y
    covariance = prior * (np.eye(x.shape[1]) - gain @ x)
    _, log_determinant = np.linalg.slogdet(gram)
    evidence = -0.5 * (y @ np.linalg.solve(gram, y) + log_determinant)
    return float(evidence), mean, (covariance + covariance.T) / 2


def _with_intercept(features: Floats) -> Floats:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)
