"""How good samples of digits are, beside held-out pictures: in the features of a classifier."""

from __future__ import annotations

import dataclasses

import numpy as np
from ladder.pictures import enlarged

from mmh_jax import evaluation, mapping
from mmh_jax.typing import Array

_answers = mapping.over_points(
    lambda classifier, x: (classifier.features(x), classifier.logits(x)), (None, 0), chunk_size=256
)


def answers(classifier: evaluation.Classifier, pictures: np.ndarray) -> tuple[Array, Array]:
    """Features and logits of grey pictures of 28 x 28 or 8 x 8 pixels, cut off at 0 and 1."""
    pictures = np.clip(np.asarray(pictures, np.float32), 0, 1)
    if pictures.shape[1:] == (8, 8):
        pictures = enlarged(pictures)
    return _answers(classifier, pictures)


def total_variation(pictures: np.ndarray) -> float:
    """The mean difference of neighbouring pixels, in both directions, of pictures (N, H, W).

    >>> float(total_variation(np.array([[[0.0, 1.0], [0.0, 1.0]]])))
    0.5
    """
    pictures = np.clip(np.asarray(pictures, float), 0, 1)
    across, down = np.abs(np.diff(pictures, axis=2)), np.abs(np.diff(pictures, axis=1))
    return float((across.sum() + down.sum()) / (across.size + down.size))


@dataclasses.dataclass(frozen=True)
class Quality:
    """Judges samples; called with them, and with what they are to show if that is known.

    The Frechet distance is biased upwards by few samples: compare sets of one size.  Digits of
    8 x 8 pixels are enlarged, which the classifier was not trained on: its agreement with labels
    is to be read beside that of held-out pictures, not beside 1.

    Attributes:
        classifier: of digits.
        features: (M, d) of held-out pictures.
        num_neighbors: of precision and recall.
    """

    classifier: evaluation.Classifier
    features: np.ndarray
    num_neighbors: int = 5

    def __call__(self, samples: np.ndarray, labels: np.ndarray | None = None) -> dict[str, float]:
        """Frechet distance, precision, recall, confidence, total variation, label agreement."""
        features, logits = answers(self.classifier, samples)
        inside = evaluation.prdc(features, self.features, num_neighbors=self.num_neighbors)
        found = {
            "Frechet": evaluation.frechet_distance(features, self.features).value,
            "precision": inside.precision.value, "recall": inside.recall.value,
            "confidence": evaluation.certainty(logits).confidence.value,
            "total variation": total_variation(samples),
        }  # fmt: skip
        if labels is not None:
            found["agreement"] = evaluation.label_agreement(logits, labels).value
        return {name: float(value) for name, value in found.items()}


def quality(held_out: np.ndarray) -> Quality:
    """Beside these pictures."""
    classifier = evaluation.mnist_classifier()
    return Quality(classifier, np.asarray(answers(classifier, held_out)[0]))
