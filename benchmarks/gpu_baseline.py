"""Do the GPU kernels still compile without spills, and as well as before?

Compiles a set of kernels for an H100 with NVIDIA's assembler, which needs no GPU
(``pip install "attnlab[gpu-aot]"``), and compares spills and stall counts with the
committed ``results/gpu_baseline.json``; and the forward pass with JAX's own kernel (of
FlashAttention-3's kind) at blocks of the same size. It fails if a kernel spills, or if
its stall counts grew by more than 3 %. The file has figures for each version of JAX and
of the assembler; where there are none of these versions, spills alone are checked.

    python -m benchmarks.gpu_baseline            compares
    python -m benchmarks.gpu_baseline --write    updates the file, and prints a table
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attnlab._src.bench.cases import Spec
from attnlab._src.bench.gpu_static import gpu_row
from attnlab._src.bench.gpus import GpuKernel, gpu_study
from attnlab._src.bench.targets import CompilerMissing
from attnlab._src.files import write_atomically
from attnlab._src.implementations.pallas_gpu.blocks import BLOCKS

FILE = Path(__file__).parent / "results" / "gpu_baseline.json"
TARGET, TOLERANCE = "gpu:h100", 0.03
HEAD_SIZES, MASKS, PASSES = (64, 128), ("full", "causal"), ("forward", "backward")

Figures = dict[str, dict[str, Any]]


def compilers() -> str:
    """The versions that the figures depend on."""
    names = "jaxlib", "nvidia-cuda-nvcc"
    return " ".join(f"{name} {metadata.version(name)}" for name in names)


def figures(kernels: Sequence[GpuKernel]) -> Figures:
    """Spills, registers, and stall counts of each loop, by kernel."""
    return {
        kernel.name: {
            "registers": kernel.registers,
            "spills": kernel.spills,
            "stalls": [loop.stalls for loop in kernel.loops],
        }
        for kernel in kernels
    }


def ours(head_size: int, mask: str, of: str, cache: Path | None = None) -> Figures:
    """Figures of one pass."""
    spec = Spec(
        pattern=mask,
        dtype="bfloat16",
        length=4096,
        heads=4,
        key_heads=4,
        head_size=head_size,
    )
    row = gpu_row(spec, of, TARGET, cache)
    if row.why:
        raise RuntimeError(f"{of} {mask} {head_size}: {row.why}")
    return figures(row.kernels)


def jax_own(head_size: int, mask: str, cache: Path | None = None) -> Figures:
    """Figures of JAX's forward kernel, with the block sizes of ours."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=BLOCKS["forward", head_size].columns,
        max_concurrent_steps=BLOCKS["forward", head_size].slots,
        causal=mask == "causal",
    )
    x = jax.ShapeDtypeStruct((1, 4096, 4, head_size), "float16")

    def attend(*arrays: jax.Array) -> jax.Array:
        return attention_mgpu.attention(*arrays, config)

    found = gpu_study(attend, x, x, x, target=TARGET, cache=cache)
    if found.why:
        raise RuntimeError(f"JAX's kernel: {found.why}")
    return figures(found.kernels)


def every(cache: Path | None = None) -> Iterator[tuple[str, Figures]]:
    """All figures, by name."""
    for head_size in HEAD_SIZES:
        for mask in MASKS:
            for of in PASSES:
                name = f"{of} {mask} {head_size}"
                yield name, ours(head_size, mask, of, cache)
            name = f"JAX forward {mask} {head_size}"
            yield name, jax_own(head_size, mask, cache)


def faults(name: str, now: Figures, before: Figures | None) -> Iterator[str]:
    """What is worse than it may be, in words."""
    for kernel, found in now.items():
        if found["spills"]:
            yield f"{name}: {kernel} spills {found['spills']} bytes of a thread"
        if before is None:
            continue
        old, new = before[kernel]["stalls"], found["stalls"]
        if len(old) != len(new) or sum(new) > (1 + TOLERANCE) * sum(old):
            yield f"{name}: stall counts of {kernel} are {new}, and were {old}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares or writes; the exit status is 1 if something is worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update the file")
    given = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    held = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        count = len(HEAD_SIZES) * len(MASKS) * (len(PASSES) + 1)
        now = dict(track(every(), total=count, console=Console(stderr=True)))
    except (CompilerMissing, RuntimeError) as error:
        Console(stderr=True).print(f"{error}", style="red", highlight=False)
        return 1
    before = held.get(compilers(), {})
    wrong = [
        fault
        for name, found in now.items()
        if not name.startswith("JAX")
        for fault in faults(name, found, before.get(name))
    ]
    table = Table(title=f"{TARGET}, {compilers()}; stall counts are no times")
    for column in ("pass, mask, head size", "kernel", "registers", "spills", "stalls"):
        table.add_column(column)
    for name, each in now.items():
        for kernel, found in each.items():
            stalls = " / ".join(map(str, found["stalls"]))
            numbers = str(found["registers"]), str(found["spills"]), stalls
            table.add_row(name, kernel, *numbers)
    console.print(table)
    for fault in wrong:
        console.print(fault, style="red", highlight=False)
    if given.write:
        held[compilers()] = now
        write_atomically(FILE, (json.dumps(held, indent=1) + "\n").encode())
        console.print(f"written: {FILE}", highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
