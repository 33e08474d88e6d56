"""A small classifier of light features, trained on labelled real images: p(y|x) where Inception is not at hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from pgm_scale.errors import UserError


def require_scikit_learn() -> None:
    """Raises: UserError: it is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError(
            "the classifier needs scikit-learn; install it with pip install 'pgm-scale[images]'"
        ) from None


class LightClassifier:
    """Multinomial logistic regression of standardised features; seconds for thousands of images of ten classes."""

    def __init__(self, features_BF: np.ndarray, labels_B: np.ndarray) -> None:
        """Fit; the labels are of at least two classes. Raises: UserError: scikit-learn is not installed."""
        require_scikit_learn()
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged to the last digit is good enough
            self._model.fit(features_BF.astype(np.float64), labels_B)

    def probabilities(self, features_BF: np.ndarray) -> np.ndarray:
        """float64 [B, K] of the classes seen in training, in ascending order."""
        return self._model.predict_proba(features_BF.astype(np.float64))

    def accuracy(self, features_BF: np.ndarray, labels_B: np.ndarray) -> float:
        """The share of images whose likeliest class is their label."""
        return float((self._model.predict(features_BF.astype(np.float64)) == labels_B).mean())
