"""Settings that the environment needs before NumPy and JAX are imported, and shared fixtures."""

import ctypes
import os
from pathlib import Path

_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache / "mmh_jax" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_devices = "--xla_force_host_platform_device_count"
if _devices not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_devices}=8".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

collect_ignore = ["data"]  # scripts that make fixtures


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Of a test marked `spread(n)`, all cases but each n-th are slow."""
    seen = {}
    for item in items:
        if (marker := item.get_closest_marker("spread")) is None:
            continue
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % marker.args[0]:
            item.add_marker(pytest.mark.slow)


def restart_generator(module):
    """A module's `RNG` from its start, so that what a test draws depends on no other test."""
    generator = getattr(module, "RNG", None)
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(request):
    restart_generator(getattr(request, "module", None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    restart_generator(getattr(item, "module", None))


def resident_gb():
    status = Path("/proc/self/statm")
    pages = int(status.read_text().split()[1]) if status.exists() else 0
    return pages * 4096 / 1e9


_full = 4.0


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """Drop compiled programs, which are kept for as long as the process lives: those of two
    thousand tests take some 10 GB."""
    global _full
    if resident_gb() > _full:
        jax.clear_caches()
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed stays with the process
        _full = max(4.0, resident_gb() + 1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of each kind of tiny published pipeline, written once."""
    import pretrained_folders as folders

    root, there = tmp_path_factory.mktemp("published"), {}

    def find(kind):
        if kind not in there:
            there[kind] = folders.write(kind, root / kind)
        return there[kind]

    return find


@pytest.fixture(scope="module")
def loaded(published):
    """The pipeline of each kind, read once."""
    from mmh_jax import pretrained

    there = {}

    def find(kind):
        if kind not in there:
            there[kind] = pretrained.load(published(kind))
        return there[kind]

    return find


@pytest.fixture
def x64():
    """Double precision inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def plane(x64):
    """A denoiser of a 3-dimensional Gaussian in R^10, scales .5 to 2, and a point of it."""
    rng = np.random.default_rng(0)
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(10, 3)))[0])
    variances = jnp.array([0.25, 1.0, 4.0])

    def denoiser(x, sigma):
        return basis @ (variances / (variances + sigma**2) * (basis.T @ x))

    return denoiser, basis @ jnp.array([0.1, -0.5, 1.0]), variances
