"""The classifiers that come with the package, and what is read off their answers.

Accuracy on the whole test sets where they are at hand: MMH_MNIST and MMH_FASHION_MNIST name
`t10k-images-idx3-ubyte` files, with the labels beside them.  `data/fashion_mnist_100.npz` holds the
first 100 test images of FashionMNIST (Zalando SE, MIT licence).
"""

import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from safetensors.numpy import load_file

from mmh_jax import data, evaluation
from mmh_jax.evaluation import classifier as room
from mmh_jax.mapping import over_points

FIXTURE = Path(__file__).parent / "data" / "fashion_mnist_100.npz"
LOGITS = over_points(lambda model, x: model.logits(x), (None, 0), chunk_size=100)


def small():
    return evaluation.untrained_classifier(("a", "b"), key=jax.random.key(0), channels=(2, 3, 4, 5))


def test_fashion_mnist_on_a_hundred_images():
    source = data.load(FIXTURE)
    assert source.points.shape == (100, 28, 28)
    assert source.is_image
    model = evaluation.fashion_mnist_classifier()
    found = evaluation.label_agreement(LOGITS(model, source.points), source.labels)
    assert found.value >= 0.87
    # And not by labels in another order.
    shuffled = (source.labels + 1) % 10
    assert evaluation.label_agreement(LOGITS(model, source.points), shuffled).value < 0.1


@pytest.mark.parametrize(
    ("variable", "load", "least"),
    [
        ("MMH_MNIST", evaluation.mnist_classifier, 0.99),
        ("MMH_FASHION_MNIST", evaluation.fashion_mnist_classifier, 0.915),
    ],
)
def test_accuracy_on_the_whole_test_set(variable, load, least):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name a t10k-images-idx3-ubyte file")
    source = data.load(path)
    assert len(source.points) == 10_000
    assert evaluation.label_agreement(LOGITS(load(), source.points), source.labels).value >= least


@pytest.mark.parametrize("load", [evaluation.mnist_classifier, evaluation.fashion_mnist_classifier])
def test_packaged_classifiers(load):
    model = load()
    assert len(set(model.classes)) == 10
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    images = data.load(FIXTURE).points[:20]
    features = np.asarray(jax.vmap(model.features)(images))
    assert features.shape == (20, 64)
    assert features.min() >= 0
    np.testing.assert_allclose(
        jax.vmap(model.logits)(images), features @ model.weights + model.bias, atol=1e-3
    )
    one = model.features(jnp.asarray(images[0])[..., None])
    np.testing.assert_allclose(one, features[0], atol=1e-4)


def test_features_have_unit_mean_square_on_their_own_data():
    images = data.load(FIXTURE).points
    features = jax.vmap(evaluation.fashion_mnist_classifier().features)(images)
    np.testing.assert_allclose(np.mean(np.asarray(features) ** 2), 1, rtol=0.15)


def test_weights_are_small_files_of_half_precision():
    folder = Path(room.__file__).parent / "weights"
    files = sorted(folder.glob("*.safetensors"))
    assert [file.stem for file in files] == ["fashion_mnist", "mnist"]
    for file in files:
        assert file.stat().st_size < 2_000_000
        assert all(array.dtype == np.float16 for array in load_file(file).values())


def test_distances_tell_images_from_noise():
    model = evaluation.fashion_mnist_classifier()
    images = data.load(FIXTURE).points
    noise = np.random.default_rng(0).random((50, 28, 28)).astype(np.float32)
    features = [np.asarray(jax.vmap(model.features)(x)) for x in (images[:50], images[50:], noise)]
    near = evaluation.kernel_distance(features[1], features[0])
    far = evaluation.kernel_distance(features[2], features[0])
    assert abs(near.value) < 3 * near.stderr
    assert far.value > 5 * far.stderr
    # Noise has narrow features: in wide balls of the data, and none of the data in its own.
    assert evaluation.prdc(features[2], features[0]).recall.value < 0.05
    assert evaluation.prdc(features[1], features[0]).recall.value > 0.7


def test_the_network_is_differentiable_in_its_input(x64):
    model = jax.tree.map(lambda leaf: leaf.astype(float), small())
    image = jax.random.uniform(jax.random.key(1), (28, 28))
    check_grads(model.features, (image,), order=1, modes=["fwd", "rev"], rtol=1e-5)


def test_what_is_saved_is_read_back(tmp_path):
    model = small()
    path = tmp_path / "model.safetensors"
    evaluation.save_classifier(path, model)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044
    found = evaluation.load_classifier(path)
    assert found.classes == ("a", "b")
    assert found.apply == model.apply
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float16), np.asarray(other, np.float16))
    image = jnp.ones((28, 28)) / 2
    np.testing.assert_allclose(found.features(image), model.features(image), atol=1e-3)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    evaluation.save_classifier(path, small())
    content = path.read_bytes()
    cases = {
        "half": content[: len(content) // 2],
        "empty": b"",
        "text": b"not a model at all, but long enough",
        "renamed": content.replace(b"fine", b"dine"),
        "no classes": content.replace(b'"classes"', b'"glasses"'),
    }
    for damaged in cases.values():
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            evaluation.load_classifier(path)
    with pytest.raises(FileNotFoundError):
        evaluation.load_classifier(tmp_path / "none")


def test_certainty_of_known_answers():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        found = evaluation.certainty(np.maximum(np.log(p), -1e9) + 5)
    entropies = [-sum(q * np.log(q) for q in row if q > 0) for row in p]
    np.testing.assert_allclose(found.confidence.value, 2.5 / 3)
    np.testing.assert_allclose(found.entropy.value, np.mean(entropies))
    np.testing.assert_allclose(found.entropy.stderr, np.std(entropies, ddof=1) / np.sqrt(3))
    mean = p.mean(axis=0)
    np.testing.assert_allclose(found.marginal_entropy, -np.sum(mean * np.log(mean)))


def test_uniform_answers_have_the_entropy_of_all_classes():
    found = evaluation.certainty(np.zeros((4, 10)))
    np.testing.assert_allclose(found.entropy.value, np.log(10))
    np.testing.assert_allclose(found.marginal_entropy, np.log(10))
    collapsed = evaluation.certainty(np.eye(10)[[3, 3]] * 100)
    assert collapsed.marginal_entropy < 1e-9


def test_bad_input_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r"shape \(5, 28, 28\).*jax.vmap"):
        model.features(jnp.zeros((5, 28, 28)))
    with pytest.raises(ValueError, match=r"shape \(32, 32\).*Resize"):
        model.logits(jnp.zeros((32, 32)))
    with pytest.raises(TypeError, match="uint8"):
        model.features(jnp.zeros((28, 28), jnp.uint8))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        evaluation.certainty(np.zeros(3))
    with pytest.raises(ValueError, match="float64"):
        evaluation.label_agreement(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(ValueError, match=r"from 0 to 2.*0 to 1"):
        evaluation.label_agreement(np.zeros((3, 2)), np.array([0, 1, 2]))
