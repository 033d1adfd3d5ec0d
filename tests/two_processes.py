"""One of two processes with two devices each; `test_processes` runs it.

python two_processes.py RANK PORT OUT
"""

import sys

import jax
import numpy as np


def main(rank: int, port: str, out: str) -> None:
    """Find neighbours and dimensions on three meshes of all devices, and write them."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    from mmh_jax import lid  # after the processes have found each other

    assert jax.device_count() == 4
    assert jax.local_device_count() == 2
    points = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    found = {}
    for shape, names in (((4,), ("data",)), ((4,), ("points",)), ((2, 2), ("data", "points"))):
        automatic = (jax.sharding.AxisType.Auto,) * len(shape)
        mesh = jax.make_mesh(shape, names, axis_types=automatic)
        neighbors = lid.nearest_neighbors(points, 12, block_size=32, mesh=mesh)
        mapped = lid.over_neighborhoods(lid.ess, mesh=mesh)(points, neighbors.indices)
        name = "_".join(names) + str(len(shape))
        found |= {f"distances {name}": neighbors.distances, f"indices {name}": neighbors.indices}
        found |= {f"ess {name}": mapped.value}
    np.savez(f"{out}/{rank}.npz", **found)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
