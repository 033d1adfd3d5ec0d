"""Where the arrays of a training live on a mesh: batches spread, weights copied or in pieces.

Annotations only: the program is that of one device, and XLA puts in the communication.  With the
weights in pieces (FSDP; Rajbhandari et al. 2020, 1910.02054), so are their averages and the
optimiser's moments: each device holds its share of the state and gathers a layer when it needs it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["Placement"]

# Smaller arrays are copied: a gather would cost more than it saves.
_LEAST = 2**12


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and how it is used.

    Attributes:
        mesh: its devices; all of its axes together spread a batch.
        shard_params: whether weights, averages and moments are in pieces over all axes.
    """

    mesh: Mesh
    shard_params: bool = False

    def spread(self, batch: Any) -> Any:
        """A batch, or a part of one, with its leading axis over all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return jax.lax.with_sharding_constraint(batch, sharding)

    def keep(self, state: Any) -> Any:
        """A traced state in its place."""
        return jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, self.sharding(leaf)), state
        )

    def put(self, state: Any) -> Any:
        """A state, on its devices."""
        return jax.device_put(state, jax.tree.map(self.sharding, state))

    def copied(self, tree: Any) -> Any:
        """Arrays of which every device has all."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def sharding(self, leaf: Any) -> NamedSharding:
        """Of one array of the state: its longest axis that the devices divide, if it is large."""
        num = self.mesh.size
        axes = [axis for axis, size in enumerate(leaf.shape) if size % num == 0]
        if not self.shard_params or math.prod(leaf.shape) < _LEAST or not axes:
            return NamedSharding(self.mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        spec = [None] * longest + [self.mesh.axis_names]
        return NamedSharding(self.mesh, PartitionSpec(*spec))
