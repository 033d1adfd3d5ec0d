"""Ways to run a training: conditions, parts, meshes, streams, weights of the loss, records."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import CONFIG, circle, last, untrained

from mmh_jax import denoise, nn, noise, train
from mmh_jax.train import loop
from mmh_jax.train import step as step_module
from mmh_jax.train.sharding import Placement

KEY = jax.random.key(0)


def losses_of(model, points, config, **options):
    return [metrics.loss for metrics in train.fit(model, points, config, key=KEY, **options)]


def difference(a, b):
    """The largest, over all arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs)


class Labelled(nnx.Module):
    """A linear network with a shift for each of 3 classes, and one for none."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.shift = nnx.Embed(4, 2, rngs=rngs)

    def __call__(self, x, c_noise, label=3):
        return self.linear(x) + self.shift(jnp.asarray(label))


def labelled():
    apply, params = nn.split(Labelled(rngs=nnx.Rngs(0)))
    return denoise.precondition(apply, params, sigma_data=1.0, shape=(2,))


def test_conditions_reach_the_network_and_some_are_dropped():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    centres = np.array([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], np.float32)
    points = centres[labels] + 0.1 * rng.normal(size=(300, 2)).astype(np.float32)
    config = train.TrainConfig(
        num_steps=1500, batch_size=100, learning_rate=0.02, condition_dropout=0.2, null_condition=3,
        noise_levels=train.log_uniform(0.5, 5.0), ema_half_life=50.0,
    )  # fmt: skip
    state = last(train.fit(labelled(), points, config, key=KEY, conditions=labels)).state
    model = labelled().replace(params=state.ema)
    for label, centre in enumerate(centres):
        far = model.condition(jnp.asarray(label))(jnp.zeros(2), 4.0)
        assert np.linalg.norm(far - centre) < 0.4, label
    assert np.linalg.norm(model(jnp.zeros(2), 4.0) - points.mean(axis=0)) < 0.4
    with_all = dataclasses.replace(config, condition_dropout=1.0, num_steps=30)
    state = last(train.fit(labelled(), points, with_all, key=KEY, conditions=labels)).state
    moved = np.asarray(state.params["shift"]["embedding"][...])
    start = np.asarray(labelled().params["shift"]["embedding"][...])
    np.testing.assert_array_equal(moved[:3], start[:3])
    assert not np.array_equal(moved[3], start[3])


def test_parts_give_the_gradient_of_the_whole():
    config = dataclasses.replace(CONFIG, num_steps=12, ema_widths=(0.1,))
    whole = last(train.fit(untrained(), circle(), config, key=KEY))
    parts = last(
        train.fit(untrained(), circle(), dataclasses.replace(config, accumulate=4), key=KEY)
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert difference(parts.state.params, whole.state.params) < 1e-5


@pytest.mark.spread(3)
@pytest.mark.parametrize("shard_params", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_train_as_one(shard_params, accumulate):
    config = dataclasses.replace(CONFIG, num_steps=24, accumulate=accumulate)
    network = nn.ResidualMLP((2,), width=128, depth=1, rngs=nnx.Rngs(0))
    apply, params = nn.split(network)
    model = denoise.precondition(apply, params, sigma_data=1.0, shape=(2,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one = losses_of(model, circle(), config)
    iterator = train.fit(model, circle(), config, key=KEY, mesh=mesh, shard_params=shard_params)
    many = []
    for metrics in iterator:
        many.append(metrics.loss)
        kernel = metrics.state.params["blocks"][0]["inner"]["kernel"][...]
        moment = jax.tree.leaves(metrics.state.opt_state)
        spread = {leaf.sharding.is_fully_replicated for leaf in moment if leaf.size == kernel.size}
        assert kernel.sharding.is_fully_replicated != shard_params
        assert spread == {not shard_params}
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_placement_cuts_the_longest_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = Placement(mesh, shard_params=True)
    spec = lambda *shape: place.sharding(jax.ShapeDtypeStruct(shape, jnp.float32)).spec  # noqa: E731
    assert tuple(spec(64, 4096)) == (None, "data")
    assert tuple(spec(4096, 64)) == ("data",)
    assert tuple(spec(3, 3, 63, 999)) == ()
    assert (
        tuple(
            spec(
                8,
            )
        )
        == ()
    )


def test_a_batch_is_spread():
    mesh = jax.make_mesh((4, 2), ("one", "two"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    batch = jax.jit(Placement(mesh).spread)(jnp.ones((16, 3)))
    assert [piece.data.shape for piece in batch.addressable_shards] == [(2, 3)] * 8


def test_a_mesh_must_divide_the_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="8 devices, which do not divide the 4 points"):
        losses_of(untrained(), circle(), dataclasses.replace(CONFIG, accumulate=8), mesh=mesh)
    with pytest.raises(ValueError, match="needs a `mesh`"):
        losses_of(untrained(), circle(), CONFIG, shard_params=True)


def stream_of(points, size):
    def batch(number):
        rng = np.random.default_rng(number)
        return points[rng.integers(0, len(points), size)], None

    return train.Stream(batch)


def test_a_stream_trains_and_resumes(monkeypatch):
    monkeypatch.setattr(loop, "_CHUNK", 32 * 2 * 3)  # three batches at a time
    config = dataclasses.replace(CONFIG, num_steps=25)
    stream = stream_of(circle(), 32)
    whole = last(train.fit(untrained(), stream, config, key=KEY)).state
    iterator = train.fit(untrained(), stream, config, key=KEY)
    first = next(iterator)
    assert first.step == 10
    half = jax.tree.map(jnp.array, first.state)
    resumed = last(train.fit(untrained(), stream, config, key=KEY, state=half)).state
    assert int(whole.step) == 25
    assert difference(whole.params, resumed.params) == 0
    longer = dataclasses.replace(
        CONFIG, num_steps=400, learning_rate=0.01, noise_levels=train.log_uniform(0.1, 0.5)
    )
    losses = losses_of(untrained(), stream, longer)
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    with pytest.raises(ValueError, match="batch 0 of the stream holds 7 points"):
        losses_of(untrained(), stream_of(circle(), 7), CONFIG)


def test_grain_reads_a_mapped_file(tmp_path):
    pytest.importorskip("grain")
    np.save(tmp_path / "points.npy", circle(64))
    source = np.load(tmp_path / "points.npy", mmap_mode="r")
    stream = train.grain_stream(
        source, batch_size=32, seed=1, transform=lambda x: (np.asarray(x) * 2, np.int32(1))
    )
    batches = [stream.batch(number) for number in range(4)]
    for start in (0, 2):  # each point once in an epoch, in another order in the next
        epoch = np.concatenate([points for points, _ in batches[start : start + 2]])
        np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(2 * circle(64), axis=0))
    assert not np.array_equal(batches[0][0], batches[2][0])
    np.testing.assert_array_equal(batches[1][0], stream.batch(1)[0])
    other = train.grain_stream(2 * source, batch_size=32, seed=2)
    assert not np.array_equal(batches[0][0], other.batch(0)[0])
    assert batches[0][1].shape == (32,)
    with pytest.raises(ValueError, match="fewer than batch_size=100"):
        train.grain_stream(source, batch_size=100, seed=1)


@dataclasses.dataclass(frozen=True)
class Flip:
    def __call__(self, x, *, key):
        return jnp.where(jax.random.bernoulli(key), x, -x)


def test_points_are_augmented():
    points = np.tile(np.array([[1.0, 0.0]], np.float32), (64, 1))
    config = dataclasses.replace(
        CONFIG, num_steps=600, learning_rate=3e-3, noise_levels=train.log_uniform(2.0, 5.0)
    )
    found = {}
    for name, augment in (("flipped", Flip()), ("as it is", None)):
        one = dataclasses.replace(config, augment=augment)
        state = last(train.fit(untrained(), points, one, key=KEY)).state
        found[name] = untrained().replace(params=state.ema)(jnp.zeros(2), 4.0)[0]
    assert abs(found["flipped"]) < 0.3
    assert found["as it is"] > 0.8


def test_the_objective_of_vp():
    """With `noise_weight` the loss is the squared error of the noise, at uniform times."""
    schedule = noise.VP()
    levels = train.uniform_time(schedule, 1e-3, 1.0)
    sigma = levels(2000, key=KEY)
    t = np.sort(np.asarray(schedule.time(sigma)))
    np.testing.assert_allclose(t, np.linspace(1e-3, 1, 2000), atol=2e-3)
    x0, s = jnp.ones(4), jnp.asarray(0.5)
    model = denoise.from_function(lambda x_t, t: 0.1 * x_t, schedule, prediction=denoise.eps)
    loss = train.denoising_loss(model, x0, s, 1.0, key=KEY, weight=train.noise_weight)
    noise_ = jax.random.normal(KEY, (4,))
    alpha = schedule.alpha(schedule.time(s))
    assert float(loss) == pytest.approx(
        float(jnp.mean((0.1 * alpha * (x0 + s * noise_) - noise_) ** 2)), rel=1e-4
    )
    assert float(train.min_snr_weight(5.0)(2.0, 1.0)) == 0.25


def test_a_vp_model_is_trained():
    schedule = noise.VP()
    network = nn.ResidualMLP((2,), width=64, depth=2, rngs=nnx.Rngs(0))
    apply, params = nn.split(network)
    model = denoise.NetworkDenoiser(params, schedule, apply=apply, prediction=denoise.eps)
    config = dataclasses.replace(
        CONFIG, num_steps=600, noise_levels=train.uniform_time(schedule, 0.01, 1.0),
        weight=train.noise_weight,
    )  # fmt: skip
    losses = losses_of(model, circle(), config)
    assert losses[-1] < 0.6 * losses[0]


def test_settings_that_change_the_run_change_its_fingerprint():
    print_of = functools.partial(train.run_fingerprint, circle())
    changed = [
        {"weight": train.noise_weight}, {"weight": train.min_snr_weight(3.0)}, {"accumulate": 2},
        {"condition_dropout": 0.1, "null_condition": 3}, {"augment": Flip()},
        {"ema_widths": (0.1,)}, {"symmetry": 0.5},
    ]  # fmt: skip
    prints = [print_of(dataclasses.replace(CONFIG, **fields)) for fields in changed]
    assert len({print_of(CONFIG), *prints}) == len(changed) + 1
    assert prints == [print_of(dataclasses.replace(CONFIG, **fields)) for fields in changed]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate": 5}, "must divide batch_size=32"),
        ({"accumulate": 2, "symmetry": 0.1}, "use one of the two"),
        ({"condition_dropout": 1.5}, "is a probability"),
        ({"ema_widths": (0.5,)}, "between 0 and"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_augmentation_noise_and_dropped_conditions_have_their_own_keys():
    @dataclasses.dataclass(frozen=True)
    class Keep:
        def __call__(self, x, *, key):
            return jax.random.normal(key, x.shape)

    config = dataclasses.replace(CONFIG, augment=Keep())
    x0, _, (noise_keys, drop_keys), _ = step_module._inputs(config, circle(32), None, KEY)
    noises = [jax.vmap(lambda k: jax.random.normal(k, (2,)))(k) for k in (noise_keys, drop_keys)]
    for a, b in ((x0, noises[0]), (x0, noises[1]), noises):
        assert not np.any(np.asarray(a) == np.asarray(b))


def test_rounds_end_where_states_are_kept():
    for size, epoch in ((100, 3), (448, 14)):
        config = dataclasses.replace(CONFIG, num_steps=42, steps_per_round=20)
        rounds = train.fit(untrained(), circle(size), config, key=KEY, pause_every=10)
        steps = [metrics.step for metrics in rounds]
        assert {10, 20, 30, 40} <= set(steps)
        assert steps[-1] == 42
        whole = last(train.fit(untrained(), circle(size), config, key=KEY)).state
        rounds = train.fit(untrained(), circle(size), config, key=KEY, pause_every=epoch)
        assert difference(last(rounds).state.params, whole.params) < 1e-6
    with pytest.raises(ValueError, match="pause_every=0"):
        losses_of(untrained(), circle(), CONFIG, pause_every=0)


def test_a_state_within_an_epoch_continues_with_longer_rounds():
    config = dataclasses.replace(CONFIG, num_steps=20, steps_per_round=4)
    points = circle(320)  # ten steps in an epoch
    whole = last(train.fit(untrained(), points, config, key=KEY)).state
    state = jax.tree.map(jnp.array, next(train.fit(untrained(), points, config, key=KEY)).state)
    longer = dataclasses.replace(config, steps_per_round=20)
    rest = last(train.fit(untrained(), points, longer, key=KEY, state=state))
    assert rest.step == 20
    assert difference(rest.state.params, whole.params) < 1e-6


def test_settings_without_a_name():
    with pytest.raises(ValueError, match="no name by which another process"):
        train.run_fingerprint(circle(), dataclasses.replace(CONFIG, weight=lambda s, d: s))


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",))
    config = dataclasses.replace(CONFIG, num_steps=6)
    np.testing.assert_allclose(
        losses_of(untrained(), circle(), config, mesh=mesh),
        losses_of(untrained(), circle(), config), rtol=1e-5,
    )  # fmt: skip


def test_points_and_labels_that_cannot_be():
    with pytest.raises(TypeError, match="dtype uint8"):
        losses_of(untrained(), circle().astype(np.uint8), CONFIG)
    with pytest.raises(ValueError, match="at least one point"):
        losses_of(untrained(), circle(0), CONFIG)
    config = dataclasses.replace(CONFIG, condition_dropout=0.1, null_condition=3)
    with pytest.raises(ValueError, match=r"labels from 0 to 5.*from 0 to 2"):
        losses_of(labelled(), circle(6), config, conditions=np.arange(6))


class Told(nnx.Module):
    """A linear network, with the mean of its tokens added."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.conditioning = nn.Conditioning(2, token_size=2, num_tokens=3, rngs=rngs)

    def __call__(self, x, c_noise, cond=None):
        return self.linear(x) + self.conditioning(cond)[1].mean(0)


def test_the_learned_null_condition_is_trained():
    apply, params = nn.split(Told(rngs=nnx.Rngs(0)))
    model = denoise.precondition(apply, params, sigma_data=1.0, shape=(2,))
    tokens = np.random.default_rng(0).normal(size=(100, 3, 2)).astype(np.float32)
    for probability in (1.0, 0.0):
        config = dataclasses.replace(CONFIG, condition_dropout=probability, num_steps=4)
        state = last(train.fit(model, circle(), config, key=KEY, conditions=tokens)).state
        moved = state.params["conditioning"]["null_tokens"][...]
        start = params["conditioning"]["null_tokens"][...]
        assert bool(jnp.all(moved == start)) == (probability == 0.0)


def test_gradients_are_clipped_to_their_norm():
    config = dataclasses.replace(CONFIG, max_grad_norm=0.5)
    gradient = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([[40.0]])}
    optimizer = config.optimizer()
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    # Adam's first moment after one step is a tenth of what it was given.
    (moment,) = (
        part.mu
        for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    np.testing.assert_allclose(moment["a"], [0.03, 0.0], rtol=1e-5)
    np.testing.assert_allclose(moment["b"], [[0.04]], rtol=1e-5)


def test_labels_that_the_network_does_not_know():
    """In a compiled step they become NaN, and the loss with them."""
    network = nn.UNet((4, 4), width=4, multipliers=(1,), num_classes=3, rngs=nnx.Rngs(0))
    apply, params = nn.split(network)
    model = denoise.precondition(apply, params, shape=(4, 4))
    points, labels = np.ones((32, 4, 4), np.float32), np.arange(32) % 3
    labels[7] = 3
    for fields in ({}, {"null_condition": 10, "condition_dropout": 0.1}):
        config = dataclasses.replace(CONFIG, **fields)
        with pytest.raises(ValueError, match=r"from 0 to 3; this network has 3 classes"):
            losses_of(model, points, config, conditions=labels)
    stream = train.Stream(lambda n: (points, labels - n))
    with pytest.raises(ValueError, match=r"batch 0 of the stream holds labels from 0 to 3"):
        losses_of(model, stream, CONFIG)


def test_conditions_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(7,\) for 100 points"):
        losses_of(labelled(), circle(), CONFIG, conditions=np.zeros(7, int))


def test_out_of_memory_says_what_to_do(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(loop, "_round", fail)
    with pytest.raises(MemoryError, match="smaller batch, or `accumulate` more than 1"):
        losses_of(untrained(), circle(), CONFIG)


def test_a_model_that_does_not_fit_in_memory(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    # Not only in a step: where the state is made, too.
    monkeypatch.setattr(loop, "init_state", fail)
    with pytest.raises(MemoryError, match="smaller network"):
        losses_of(untrained(), circle(), CONFIG)


def test_records(tmp_path):
    log = train.JsonLines(tmp_path / "m.jsonl")
    for step in (5, 10, 15):
        log({"step": step, "loss": float("nan") if step == 5 else 1.0 / step})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # cut off
    again = train.JsonLines(tmp_path / "m.jsonl", step=10)
    again({"step": 15, "loss": 2.0})
    rows = train.read_json_lines(tmp_path / "m.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert [row["loss"] for row in rows] == [None, 0.1, 2.0]
    again({"step": np.int64(25), "loss": np.float32(0.5)})
    with pytest.raises(ValueError, match="no integer"):
        again({"loss": 1.0})
    (tmp_path / "bad.jsonl").write_text('{"loss": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is no row of metrics"):
        train.read_json_lines(tmp_path / "bad.jsonl")


def test_a_checkpoint_of_another_architecture(tmp_path):
    def state_of(width):
        apply, params = nn.split(nn.ResidualMLP((2,), width=width, depth=1, rngs=nnx.Rngs(0)))
        return train.init_state(denoise.precondition(apply, params, shape=(2,)), CONFIG)

    with train.Checkpoints(tmp_path, "run") as checkpoints:
        checkpoints.save(state_of(16))
        with pytest.raises(ValueError, match="of another architecture"):
            checkpoints.latest(state_of(24))
        assert checkpoints.latest(state_of(16)) is not None  # it is still there


@pytest.mark.parametrize("what", ["run/metadata", "state/_METADATA", "state/manifest.ocdbt", "all"])
def test_a_half_written_checkpoint(what, tmp_path):
    state = train.init_state(untrained(), CONFIG)
    with train.Checkpoints(tmp_path, "run") as checkpoints:
        for step in (10, 20):
            checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)))
    if what == "all":
        shutil.rmtree(tmp_path / "20")
        (tmp_path / "20").mkdir()
    else:
        path = tmp_path / "20" / what
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with train.Checkpoints(tmp_path, "run") as checkpoints:
        with pytest.raises(
            ValueError, match=r"Delete .*20; the run continues from step 10\."
        ) as caught:
            checkpoints.latest(state)
        assert "\n" not in str(caught.value)
        assert int(checkpoints.at(10, state).step) == 10
    shutil.rmtree(tmp_path / "20")  # as it says
    with train.Checkpoints(tmp_path, "run") as checkpoints:
        assert int(checkpoints.latest(state).step) == 10
