"""Compiles one program for a TPU, without a device, and prints the compiler's report.

It runs as a process of its own (see ``targets.py``), because the compiler may crash.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

_UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
_MEMORY = re.compile(
    r'%(\S+) = [^\n]*custom-call\([^\n]*"used_scoped_memory_configs":'
    r'\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
_CYCLES = re.compile(r'hlo_op_name: "(.*?)"\s+estimated_cycles: (\d+)')


def cycles(dumps: Path) -> dict[str, int]:
    """Estimated cycles by kernel, from the static profiles."""
    found = {}
    for path in sorted(dumps.glob("*_static_llo_profile.textproto")):
        match = _CYCLES.search(path.read_text())
        if match:
            found[match[1]] = int(match[2])
    return found


def vector_memory(program: str) -> dict[str, int]:
    """Bytes of vector memory by kernel, from the text of a compiled program."""
    return {name: int(size) for name, size in _MEMORY.findall(program)}


def schedules(dumps: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields name and schedule of each kernel, from tables of slots in each bundle."""
    for path in sorted(dumps.glob(f"*{_UTILIZATION}")):
        name = re.sub(r"^\d+-(.*)-\d+-$", r"\1", path.name[: -len(_UTILIZATION)])
        lines = path.read_text().splitlines()
        slots = [x.strip() for x in lines[1].split(",")]
        capacity = [int(x) for x in lines[2].split()]
        rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        total = dict(zip(slots, sums, strict=True))
        yield (
            name,
            {
                "bundles": len(rows),
                "slots": {
                    slot: round(used / (len(rows) * most), 4)
                    for slot, used, most in zip(slots, sums, capacity, strict=True)
                },
                "fills": total["VLOAD:FILL"],
                "spills": total["VSTORE:SPILL"],
            },
        )


def main(topology: str, source: str, dumps: str) -> None:
    """Compiles the program in the file ``source``, and prints one line of JSON."""
    exported = jax.export.deserialize(bytearray(Path(source).read_bytes()))
    described: Any = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    )
    sharding = jax.sharding.SingleDeviceSharding(described.devices[0])
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in exported.in_avals
    ]
    lowered = jax.jit(exported.call).trace(*shapes).lower(lowering_platforms=("tpu",))
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps({"why": str(error).splitlines()[0][:300]}))  # noqa: T201
        return
    told, memories = cycles(Path(dumps)), vector_memory(compiled.as_text())
    kernels = [
        {
            "name": name,
            "cycles": told.get(name),
            "memory": memories.get(name),
            **schedule,
        }
        for name, schedule in schedules(Path(dumps))
        if not name.startswith(("<", "TLP"))
    ]
    memory: Any = compiled.memory_analysis()
    answer = {
        "kernels": kernels,
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
    }
    print(json.dumps(answer))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
