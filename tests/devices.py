"""Four simulated devices, and what a compiled program sends between them."""

import re

import jax
import numpy as np
from jax.sharding import AxisType

COLLECTIVES = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
WIDTH = {"f32": 4, "s32": 4, "pred": 1, "bf16": 2}


def collectives(compiled):
    """By kind of collective, the bytes of its results on each device."""
    found = {}
    for shapes, kind in COLLECTIVES.findall(compiled.as_text()):
        arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        sizes = [
            WIDTH[t] * np.prod([int(n) for n in d.split(",") if n]) for t, d in arrays
        ]
        found[kind] = found.get(kind, 0) + int(sum(sizes))
    return found


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
