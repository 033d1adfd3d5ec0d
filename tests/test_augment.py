import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax.data import augment

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 600)
PICTURES = {
    "grey": RNG.uniform(0.1, 1, (5, 7)).astype(np.float32),
    "colour": RNG.uniform(0.1, 1, (5, 7, 3)).astype(np.float32),
}
ALL = {
    "flip": augment.horizontal_flip(),
    "shift": augment.shift(2),
    "shift edge": augment.shift(2, fill=None),
    "crop": augment.crop(3, 4),
    "noise": augment.noise(0.1),
    "brightness": augment.brightness(0.1),
    "clip": augment.clip(0.2, 0.8),
    "chain": augment.chain(augment.shift(1), augment.horizontal_flip(), augment.noise(0.1)),
}


def over_keys(change, x, keys=KEYS):
    return np.asarray(jax.jit(jax.vmap(lambda key: change(x, key=key)))(keys))


@pytest.mark.spread(3)
@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("name", ALL)
def test_one_key_one_answer_under_every_transformation(name, kind):
    change, x = ALL[name], PICTURES[kind]
    eager = change(x, key=KEY)
    np.testing.assert_array_equal(eager, change(jnp.asarray(x), key=KEY))
    compiled = jax.jit(lambda change, x, key: change(x, key=key), static_argnums=0)
    np.testing.assert_allclose(compiled(change, x, KEY), eager, rtol=1e-6)
    many = jax.vmap(lambda x, key: change(x, key=key))(np.stack([x, 2 * x]), KEYS[:2])
    np.testing.assert_allclose(many[1], change(2 * x, key=KEYS[1]), rtol=1e-6)
    assert eager.dtype == x.dtype


def test_equal_values_compile_once():
    count = 0

    def call(change, x):
        nonlocal count
        count += 1
        return change(x, key=KEY)

    compiled = jax.jit(call, static_argnums=0)
    for _ in range(2):
        compiled(augment.chain(augment.shift(2), augment.noise(0.1)), PICTURES["grey"])
    compiled(augment.chain(augment.shift(2), augment.noise(0.2)), PICTURES["grey"])
    assert count == 2


@pytest.mark.parametrize("kind", PICTURES)
def test_flip_is_the_mirror_image_half_of_the_time(kind):
    x = PICTURES[kind]
    found = over_keys(augment.horizontal_flip(), x)
    turned = np.array([np.array_equal(row, x[:, ::-1]) for row in found])
    kept = np.array([np.array_equal(row, x) for row in found])
    assert np.all(turned ^ kept)
    assert abs(turned.mean() - 0.5) < 4 * 0.5 / 600**0.5
    assert np.array_equal(augment.horizontal_flip(1.0)(x, key=KEY), x[:, ::-1])
    assert np.array_equal(augment.horizontal_flip(0.0)(x, key=KEY), x)
    rare = over_keys(augment.horizontal_flip(0.1), x)
    assert abs(np.mean([np.array_equal(row, x[:, ::-1]) for row in rare]) - 0.1) < 0.05


def shifted(x, down, right, fill):
    """By hand, pixel by pixel."""
    out = np.empty_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            inside = 0 <= i - down < x.shape[0] and 0 <= j - right < x.shape[1]
            near = np.clip([i - down, j - right], 0, [x.shape[0] - 1, x.shape[1] - 1])
            out[i, j] = x[tuple(near)] if inside or fill is None else fill
    return out


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("fill", [0.0, -1.0, None])
def test_every_shift_is_equally_likely_and_no_other_occurs(kind, fill):
    x = PICTURES[kind]
    expected = {
        shifted(x, down, right, fill).tobytes(): (down, right)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    assert len(expected) == 25
    found = over_keys(augment.shift(2, fill=fill), x)
    counts = dict.fromkeys(expected.values(), 0)
    for row in found:
        counts[expected[row.tobytes()]] += 1
    # chi-square of 24 degrees of freedom: mean 24, standard deviation 6.9
    assert sum((count - 24) ** 2 / 24 for count in counts.values()) < 24 + 4 * 6.9
    assert np.array_equal(augment.shift(0, fill=fill)(x, key=KEY), x)


def test_every_window_occurs():
    x = PICTURES["colour"]
    expected = {x[i : i + 3, j : j + 4].tobytes() for i in range(3) for j in range(4)}
    found = {row.tobytes() for row in over_keys(augment.crop(3, 4), x)}
    assert found == expected
    assert np.array_equal(augment.crop(5, 7)(x, key=KEY), x)


def test_noise_and_brightness_have_the_stated_size():
    x = np.zeros((40, 50), np.float32)
    found = over_keys(augment.noise(0.3), x, KEYS[:20])
    assert abs(found.std() - 0.3) < 4 * 0.3 / (2 * found.size) ** 0.5
    assert abs(found.mean()) < 4 * 0.3 / found.size**0.5
    change = over_keys(augment.brightness(0.3), x)
    assert np.ptp(change.reshape(600, -1), axis=1).max() == 0
    change = change[:, 0, 0]
    assert change.min() >= -0.3
    assert change.max() <= 0.3
    assert abs(change.std() - 0.3 / 3**0.5) < 0.015
    assert abs(change.mean()) < 4 * 0.3 / 3**0.5 / 600**0.5


def test_chain_gives_each_step_a_key_of_its_own():
    x = np.zeros((30, 30), np.float32)
    twice = augment.chain(augment.noise(1.0), augment.noise(1.0))(x, key=KEY)
    assert abs(float(twice.std()) - 2**0.5) < 0.15  # 2 if they had the same
    ordered = augment.chain(augment.brightness(5.0), augment.clip(0.0, 1.0))
    assert 0 <= float(ordered(x, key=KEY).min()) <= float(ordered(x, key=KEY).max()) <= 1
    assert np.array_equal(augment.chain()(x, key=KEY), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: augment.horizontal_flip(1.5), "between 0 and 1"),
        (lambda: augment.horizontal_flip(float("nan")), "between 0 and 1"),
        (lambda: augment.shift(-1), "at least 0"),
        (lambda: augment.shift(1.5), "integer"),
        (lambda: augment.shift(True), "integer"),
        (lambda: augment.shift(1, fill=float("inf")), "finite"),
        (lambda: augment.crop(0, 3), "height=0"),
        (lambda: augment.crop(3, 2.5), "width=2.5"),
        (lambda: augment.noise(-0.1), "at least 0"),
        (lambda: augment.noise(float("nan")), "finite"),
        (lambda: augment.brightness(-1), "at least 0"),
        (lambda: augment.clip(1, 0), "range is empty"),
        (lambda: augment.crop(6, 3)(PICTURES["grey"], key=KEY), "larger than the picture"),
        (lambda: augment.crop(3, 8)(PICTURES["grey"], key=KEY), "larger than the picture"),
        (lambda: augment.shift(1)(np.zeros(4), key=KEY), "one picture"),
        (lambda: augment.horizontal_flip()(np.zeros((2, 4, 4, 3)), key=KEY), "jax.vmap"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", sorted(set(ALL) - {"clip"}))
def test_a_key_is_needed(name):
    with pytest.raises(TypeError):
        ALL[name](PICTURES["grey"])
    with pytest.raises(TypeError, match="key"):
        ALL[name](PICTURES["grey"], key=None)
    with pytest.raises(TypeError, match="typed key"):
        ALL[name](PICTURES["grey"], key=jax.random.PRNGKey(0))


def test_bytes_are_moved_but_not_changed():
    x = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert augment.shift(1)(x, key=KEY).dtype == np.uint8
    for change in (augment.noise(0.1), augment.brightness(0.1), augment.clip(0, 1)):
        with pytest.raises(TypeError, match="data units"):
            change(x, key=KEY)


def test_steps_of_a_chain():
    with pytest.raises(TypeError, match="no augmentation"):
        augment.chain(augment.shift(1), 3)
