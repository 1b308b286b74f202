"""Compiles one program for a GPU, without a device, and prints the compilers' report.

It runs as a process of its own (see ``gpus.py``), because the compiler may crash.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu  # noqa: F401

from attnlab._src.bench.gpus import CARDS, cuda_root, kernels_of


def main(target: str, source: str, dumps: str) -> None:
    """Compiles the program in the file ``source``, and prints one line of JSON."""
    # Mosaic GPU sets this to another folder, without a disassembler, when imported.
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(cuda_root())
    exported = jax.export.deserialize(bytearray(Path(source).read_bytes()))
    config: dict[str, Any] = {"target_config": CARDS[target].config()}
    described: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", **config
    )
    sharding = jax.sharding.SingleDeviceSharding(described.devices[0])
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in exported.in_avals
    ]
    lowered = jax.jit(exported.call).trace(*shapes).lower(lowering_platforms=("cuda",))
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps({"why": str(error).splitlines()[0][:300]}))  # noqa: T201
        return
    memory: Any = compiled.memory_analysis()
    answer = {
        "kernels": list(kernels_of(Path(dumps))),
        "temporary": memory.temp_size_in_bytes,
    }
    print(json.dumps(answer))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
