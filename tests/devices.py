"""Four simulated devices, and what a compiled program sends between them."""

import re

import jax
import numpy as np
from jax.sharding import AxisType

COLLECTIVES = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
WIDTH = {"f32": 4, "s32": 4, "pred": 1, "bf16": 2, "u32": 4}


def collectives(compiled):
    """By kind of collective, the bytes of its results on each device."""
    found = {}
    for shapes, kind in COLLECTIVES.findall(compiled.as_text()):
        found[kind] = found.get(kind, 0) + bytes_of(shapes)
    return found


def bytes_of(shapes):
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    each = (
        WIDTH[t] * np.prod([int(n) for n in d.split(",") if n], dtype=int)
        for t, d in arrays
    )
    return int(sum(each))


def received(compiled, count):
    """Bytes that each of ``count`` devices receives, loops counted as often as run."""
    #: A device has a part of some results already; a sum moves its array twice.
    parts = {
        "all-gather": (count - 1) / count,
        "all-reduce": 2 * (count - 1) / count,
        "all-to-all": (count - 1) / count,
        "collective-permute": 1,
        "reduce-scatter": count - 1,
    }
    bodies, name = {}, ""
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if line.startswith("ENTRY") else head[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def of(name):
        found = 0.0
        for line in bodies[name]:
            sent = COLLECTIVES.search(line)
            if sent:
                found += parts[sent[2]] * bytes_of(sent[1])
            if loop := re.search(r"while\(.*body=%([\w.\-]+)", line):
                inner = of(loop[1])
                times = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                assert times or not inner, "a loop of unknown length sends"
                found += inner * int(times[1]) if times else 0
            elif called := re.search(r"(?:to_apply|calls)=%([\w.\-]+)", line):
                found += of(called[1]) if not sent else 0
        return found

    return round(of("ENTRY"))


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
