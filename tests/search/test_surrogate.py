"""The surrogate is Bayesian linear regression: exact where that is known, uncertain where nothing was seen."""

from __future__ import annotations

import numpy as np

from omgoptim.architecture_search import propose


def test_the_posterior_recovers_weights_from_enough_observations() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((200, 3))
    truth = 5.0 + features @ np.array([2.0, -1.0, 0.0])
    posterior = propose.fit_posterior(features, truth + 0.1 * generator.standard_normal(200))
    np.testing.assert_allclose(posterior.predict(features), truth, atol=0.2)


def test_the_posterior_is_the_textbook_one() -> None:
    features, y = np.array([[1.0], [-1.0]]), np.array([1.0, -1.0])
    fitted = propose.fit_posterior(features, y)
    x = np.array([[1.0, 1.0], [1.0, -1.0]])
    options = []
    for prior in propose.PRIOR_VARIANCES:
        for noise in propose.NOISE_VARIANCES:
            covariance = np.linalg.inv(x.T @ x / noise + np.eye(2) / prior)
            options.append((covariance @ x.T @ y / noise, covariance))
    assert any(
        np.allclose(fitted.mean, mean) and np.allclose(fitted.root @ fitted.root.T, covariance)
        for mean, covariance in options
    )


def test_draws_vary_more_where_less_was_seen() -> None:
    generator = np.random.default_rng(0)
    features = np.concatenate([generator.standard_normal((30, 1)), np.zeros((30, 1))], axis=1)
    posterior = propose.fit_posterior(features, features[:, 0] + 0.1 * generator.standard_normal(30))
    seen, unseen = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    spread = [np.std([posterior.sample(row, generator) for _ in range(300)]) for row in (seen, unseen)]
    assert spread[1] > 3 * spread[0]


def test_equal_qualities_give_a_finite_prediction() -> None:
    posterior = propose.fit_posterior(np.eye(3), np.full(3, 0.5))
    np.testing.assert_allclose(posterior.predict(np.eye(3)), 0.5)
