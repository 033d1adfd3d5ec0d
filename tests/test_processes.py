"""Two processes that share their devices find what one finds."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmh_jax import lid


def test_two_processes_find_the_same_neighbours_and_dimensions(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    script = str(Path(__file__).with_name("two_processes.py"))
    try:
        both = [
            subprocess.Popen(
                [sys.executable, script, str(rank), port, str(tmp_path)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
    except OSError as error:
        pytest.skip(f"processes cannot be started here: {error}")
    try:
        outputs = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 0, output[-2000:]
    points = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    neighbors = lid.nearest_neighbors(points, 12)
    expected = {
        "distances": neighbors.distances,
        "indices": neighbors.indices,
        "ess": lid.over_neighborhoods(lid.ess)(points, neighbors.indices).value,
    }
    for rank in (0, 1):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert len(found.files) == 9
            for name in found.files:
                np.testing.assert_allclose(
                    found[name], expected[name.split()[0]], rtol=2e-4, err_msg=name
                )
