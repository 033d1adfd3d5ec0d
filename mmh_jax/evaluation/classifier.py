r"""A small image classifier: its features measure distances, its answers judge samples.

A network h(x), of four convolutions and a dense layer, makes 64 features of a grey image of 28 x 28
pixels, and a linear layer makes logits of them,

    p(c | x) = softmax(W h(x) + b)_c.

Two come with the package, trained on MNIST and on FashionMNIST by `benchmarks/train_classifier.py`.
Distances between sets of images (`frechet_distance`, `kernel_distance`, `prdc`) are taken between
their features: two networks give two scales, and values of one can only be compared with values of
the same one.

Of samples it says how sure it is of each, by the confidence max_c p(c | x) and the entropy
-sum_c p log p; of all of them, by the entropy of the mean of p, whether they are spread over the
classes; and of samples with a label, how often it agrees.  It was never shown anything but its
data: on other images it can be sure and wrong.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from mmh_jax import nn
from mmh_jax.typing import Array, ArrayLike, Estimate, Key

__all__ = [
    "Certainty",
    "Classifier",
    "certainty",
    "fashion_mnist_classifier",
    "label_agreement",
    "load_classifier",
    "mnist_classifier",
    "save_classifier",
    "untrained_classifier",
]

_SHAPE = (28, 28, 1)
_FORMAT = "mmh_jax.classifier/1"
_METADATA = "classes"


class _Features(nnx.Module):
    """28 x 28 x 1 -> 14 x 14 -> 7 x 7 -> `num_features`, all at least 0."""

    def __init__(self, channels: tuple[int, int, int, int], num_features: int, *, rngs: nnx.Rngs):
        one, two, three, four = channels
        self.enter = nnx.Conv(1, one, (5, 5), strides=2, rngs=rngs)
        self.fine = nnx.Conv(one, two, (3, 3), rngs=rngs)
        self.down = nnx.Conv(two, three, (3, 3), strides=2, rngs=rngs)
        self.coarse = nnx.Conv(three, four, (3, 3), rngs=rngs)
        self.leave = nnx.Linear(7 * 7 * four, num_features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for layer in (self.enter, self.fine, self.down, self.coarse):
            x = nnx.relu(layer(x))
        return nnx.relu(self.leave(x.reshape(-1)))


@struct.dataclass
class Classifier:
    """A classifier of grey images of 28 x 28 pixels; a pytree, one image a call.

    Cost of a call: about 7 million multiplications.

    Attributes:
        params: of the feature network.
        weights: (num_features, num_classes).
        bias: (num_classes,).
        apply: the feature network, `apply(params, x)`; static.
        classes: what they are called; static.
    """

    params: Any
    weights: Array
    bias: Array
    apply: nn.Apply = struct.field(pytree_node=False)
    classes: tuple[str, ...] = struct.field(pytree_node=False)

    def features(self, x: ArrayLike) -> Array:
        """(num_features,), at least 0, of one image (28, 28) or (28, 28, 1) in [0, 1].

        Raises:
            TypeError: if the image is not of a floating dtype.
            ValueError: if it is of another shape.
        """
        x = jnp.asarray(x)
        if x.shape not in (_SHAPE, _SHAPE[:2]):
            many = x.shape[1:] in (_SHAPE, _SHAPE[:2])
            cure = "Did you mean `jax.vmap`?" if many else "Resize it."
            raise ValueError(
                f"`Classifier(x=...)` has shape {x.shape}; it takes one image {_SHAPE[:2]} or "
                f"{_SHAPE}. {cure}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"`Classifier(x=...)` has dtype {x.dtype}; it takes values in [0, 1], for example "
                "`x.astype(float) / 255`."
            )
        return self.apply(self.params, x.reshape(_SHAPE))

    def logits(self, x: ArrayLike) -> Array:
        """(num_classes,), of one image; `jax.nn.softmax` makes probabilities of them.

        Raises:
            TypeError, ValueError: as `features`.
        """
        return self.features(x) @ self.weights + self.bias


def untrained_classifier(
    classes: tuple[str, ...],
    *,
    key: Key,
    channels: tuple[int, int, int, int] = (32, 32, 64, 128),
    num_features: int = 64,
) -> Classifier:
    """A classifier with random weights, to be trained.

    Args:
        classes: their names.
        key: draws the weights.
        channels: of the four convolutions.
        num_features: of the penultimate layer.

    >>> model = untrained_classifier(("zero", "one"), key=jax.random.key(0), channels=(2, 2, 2, 2))
    >>> model.logits(jnp.zeros((28, 28))).shape, model.features(jnp.zeros((28, 28, 1))).shape
    ((2,), (64,))
    """
    apply, params = nn.split(_Features(channels, num_features, rngs=nnx.Rngs(key)))
    weights = jnp.zeros((num_features, len(classes)))
    return Classifier(params, weights, jnp.zeros(len(classes)), apply, tuple(classes))


def mnist_classifier() -> Classifier:
    """The classifier of MNIST's digits (LeCun et al. 1998) that comes with the package.

    Trained on the 60,000 training images; accuracy on the 10,000 test images 99.0%.

    >>> model = mnist_classifier()
    >>> model.classes[:3], model.features(jnp.zeros((28, 28))).shape
    (('0', '1', '2'), (64,))
    """
    return _packaged("mnist")


def fashion_mnist_classifier() -> Classifier:
    """The classifier of FashionMNIST (Xiao et al. 2017, 1708.07747) that comes with the package.

    Trained on the 60,000 training images; accuracy on the 10,000 test images 92.6%.

    >>> fashion_mnist_classifier().classes[7]
    'sneaker'
    """
    return _packaged("fashion_mnist")


def _packaged(name: str) -> Classifier:
    file = resources.files("mmh_jax.evaluation") / "weights" / f"{name}.safetensors"
    return _from_bytes(file.read_bytes(), f"{name}.safetensors")


def _named(model: Classifier) -> dict[str, Array]:
    leaves, _ = jax.tree.flatten_with_path((model.params, model.weights, model.bias))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def save_classifier(path: str | Path, model: Classifier) -> None:
    """Write a classifier in half precision: a safetensors file, under a temporary name first."""
    arrays = {name: np.asarray(leaf, np.float16) for name, leaf in _named(model).items()}
    metadata = {"format": _FORMAT, _METADATA: json.dumps(model.classes)}
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(to_bytes(arrays, metadata))
    os.replace(partial, path)


def load_classifier(path: str | Path) -> Classifier:
    """Read a classifier that `save_classifier` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, or not a classifier.
    """
    return _from_bytes(Path(path).read_bytes(), str(path))


def _from_bytes(content: bytes, name: str) -> Classifier:
    try:
        arrays = from_bytes(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        classes = tuple(map(str, json.loads(metadata[_METADATA])))
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{name} is truncated or no classifier: {error}") from None
    by_layer = {key.split(".")[1]: a for key, a in arrays.items() if a.ndim == 4}
    try:
        channels = tuple(by_layer[layer].shape[-1] for layer in ("enter", "fine", "down", "coarse"))
        abstract = jax.eval_shape(
            lambda: untrained_classifier(
                classes,
                key=jax.random.key(0),
                channels=channels,  # pyright: ignore[reportArgumentType]
                num_features=len(arrays["1"]),
            )
        )
    except KeyError as error:
        raise ValueError(f"{name} has no array {error}; it is no classifier.") from None
    expected = {key: leaf.shape for key, leaf in _named(abstract).items()}
    if expected != {key: array.shape for key, array in arrays.items()}:
        raise ValueError(f"{name} does not hold the arrays of a classifier of this package.")
    leaves = [jnp.asarray(arrays[key], jnp.float32) for key in expected]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


class Certainty(NamedTuple):
    """How sure a classifier is of samples.

    Attributes:
        confidence: the mean of max_c p(c | x); an `Estimate`.
        entropy: the mean entropy of p(c | x), in nats; an `Estimate`.
        marginal_entropy: the entropy of the mean of p, in nats; log C if the samples are spread
            evenly over C classes, 0 if all are of one.  Biased downwards by about (C - 1) / (2 N).
    """

    confidence: Estimate
    entropy: Estimate
    marginal_entropy: float


def certainty(logits: ArrayLike) -> Certainty:
    """Confidence and entropy of a classifier's answers, averaged over samples.

    Real test images have values of their own, which are the ones to compare with.  The exponential
    of `marginal_entropy - entropy` is the inception score (Salimans et al. 2016, 1606.03498).

    Args:
        logits: (N, C), N at least 2; `jax.vmap(classifier.logits)(samples)`.

    Raises:
        ValueError: if the logits are of another shape.

    >>> found = certainty(jnp.array([[0.0, 0.0], [50.0, 0.0]]))
    >>> round(found.confidence.value, 2), round(found.entropy.value, 4)
    (0.75, 0.3466)
    """
    logits = _checked("certainty", logits)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    marginal = -np.sum(np.where(mean > 0, mean * np.log(np.where(mean > 0, mean, 1)), 0))
    return Certainty(
        _mean(p.max(axis=1)),
        _mean(-np.sum(np.where(p > 0, p * log_p, 0), axis=1)),
        float(marginal),
    )


def label_agreement(logits: ArrayLike, labels: ArrayLike) -> Estimate:
    """The share of samples of which the classifier says what they were meant to be.

    For a class-conditional generator; of test images, the accuracy.

    Args:
        logits: (N, C), N at least 2.
        labels: (N,) whole numbers from 0 to C - 1.

    Returns:
        `Estimate(value, stderr)` of floats.

    Raises:
        ValueError: if the shapes disagree, or a label is none of the classes.

    >>> label_agreement(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]))
    Estimate(value=0.5, stderr=0.5)
    """
    logits, labels = _checked("label_agreement", logits), np.asarray(labels)
    if labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`label_agreement(labels=...)` has shape {labels.shape} and dtype {labels.dtype}; it "
            f"takes one whole number for each of the {len(logits)} samples."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"`label_agreement(labels=...)` goes from {labels.min()} to {labels.max()}; the "
            f"classes are 0 to {logits.shape[1] - 1}."
        )
    return _mean(logits.argmax(axis=1) == labels)


def _checked(caller: str, logits: ArrayLike) -> np.ndarray:
    array = np.asarray(logits).astype(np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise ValueError(
            f"`{caller}(logits=...)` has shape {array.shape}; it takes (N, C) with at least 2 "
            "samples: `jax.vmap(classifier.logits)(samples)`."
        )
    return array


def _mean(values: np.ndarray) -> Estimate:
    values = values.astype(np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
