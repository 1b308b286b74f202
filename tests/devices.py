"""A mesh of four simulated devices, and what a compiled program sends between them."""

import jax
from jax.sharding import AxisType

from attnlab import bench


def collectives(compiled):
    """By kind of collective, the bytes of its results on each device."""
    found = {}
    for each in bench.collectives(compiled):
        found[each.kind] = found.get(each.kind, 0) + each.bytes
    return found


def received(compiled, count):
    """Bytes that each of ``count`` devices receives."""
    return round(sum(x.received(count) for x in bench.collectives(compiled)))


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
