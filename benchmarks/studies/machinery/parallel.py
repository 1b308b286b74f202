"""The same program on every device, each with its share of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.studies.machinery.errors import StudyError

#: Name of the only axis of the mesh.
AXIS = "batch"


def ask_for_devices(count: int) -> None:
    """Divides the CPU into ``count`` devices; call it before JAX's backend starts."""
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(count: int) -> Mesh:
    """A mesh of ``count`` devices.

    Raises:
        StudyError: if there are fewer.
    """
    devices = jax.devices()
    if len(devices) < count:
        raise StudyError(
            f"--devices: expected at most {len(devices)}, the number of devices "
            f"({devices[0].device_kind}), got {count}"
        )
    return Mesh(devices[:count], (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding: the whole array on each device."""
    return NamedSharding(mesh, P())


def divided(mesh: Mesh) -> NamedSharding:
    """Sharding: each device has its share of the first axis."""
    return NamedSharding(mesh, P(AXIS))


def on_shares(
    function: Callable[..., Any], mesh: Mesh, inputs: tuple[P, ...], outputs: P
) -> Callable[..., Any]:
    """Runs ``function`` on each device; it must sum over :data:`AXIS` itself."""
    # check_vma would refuse loops whose carry starts as a constant, as an RNN's does.
    # Without it, gradients are those of one device; callers sum them.
    return jax.shard_map(
        function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def over_batch(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A compiled ``function(model, *arrays)``, the batch divided among devices.

    Args:
        function: the first axis of its arrays and of its results is the batch.
        mesh: devices that share a batch.

    Returns:
        The same function; equal models and shapes compile once.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(structure: Any, state: Any, *arrays: Any) -> Any:
        def local(state: Any, *arrays: Any) -> Any:
            return function(nnx.merge(structure, state, copy=True), *arrays)

        specs = (P(), *(P(AXIS) for _ in arrays))
        return on_shares(local, mesh, specs, P(AXIS))(state, *arrays)

    def call(model: nnx.Module, *arrays: Any) -> Any:
        structure, state = nnx.split(model)
        return run(structure, state, *arrays)

    return call
