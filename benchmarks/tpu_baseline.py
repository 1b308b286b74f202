"""Do the TPU kernels still compile to programs as fast as before?

Compiles a set of kernels for every TPU generation, with the TPU's own compiler, which
needs no TPU (``pip install "attnlab[tpu-aot]"``), and compares cycles, spills and
vector memory with the committed ``results/tpu_baseline.json``. It fails if one of them
grew by more than 3 %.

XLA decides from the surrounding program whether a kernel's arrays are in vector memory,
where the kernel reads and writes them faster. So a change of the program around a
kernel may change its cycles and memory, but not its spills. The file has figures for
each version of JAX and of the compiler; a new version is compared with the newest in
the file.

    python -m benchmarks.tpu_baseline            compares
    python -m benchmarks.tpu_baseline --write    prints the changes and updates the file
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from attnlab import attention
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.problem import problem, sized, the_pass
from attnlab._src.bench.targets import TARGETS, CompilerMissing, Study, study
from attnlab._src.files import write_atomically
from attnlab._src.implementations.pallas_tpu.blocks import Blocks

FILE = Path(__file__).parent / "results" / "tpu_baseline.json"
#: The figures that are compared, and the share by which they may grow.
NUMBERS, TOLERANCE = ("cycles", "spills", "memory"), 0.03
BLOCKS = Blocks(512, 512, 256)


_SMALL = Spec(dtype="bfloat16", length=1024, heads=1, key_heads=1, head_size=128)

#: Pass and problem of each kernel, by name.
KERNELS = {
    "forward full": ("forward", _SMALL),
    "forward full 64": ("forward", replace(_SMALL, head_size=64)),
    "forward causal": ("forward", replace(_SMALL, pattern="causal")),
    "forward additive": ("forward", replace(_SMALL, score="additive", head_size=64)),
    "backward full": ("backward", _SMALL),
    "backward window": ("backward", replace(_SMALL, pattern="window")),
    "backward additive": (
        "backward",
        replace(_SMALL, length=256, score="additive", head_size=64),
    ),
}


def compiled(name: str, target: str, cache: Path | None = None) -> Study:
    """One kernel of ``KERNELS`` for a target."""
    of, spec = KERNELS[name]
    shapes, options = problem(spec)

    def attend(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, **options, implementation=ours.name)

    # Not the precision that JAX is set to here, but the default of a training job.
    with sized(BLOCKS) as ours, jax.default_matmul_precision("default"):
        return study(the_pass(attend, of), *shapes, target=target, cache=cache)


def numbers(found: Study) -> dict[str, dict[str, int | None]]:
    """The figures that are compared, for each of attnlab's kernels."""
    return {
        kernel.name.split(".")[0]: {n: getattr(kernel, n) for n in NUMBERS}
        for kernel in found.kernels
        if kernel.name.startswith("attnlab")
    }


def differences(
    before: Any, now: Any, path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The path, old value and new value of every number that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            there = f"{path}: {key}" if path else key
            yield from differences(before.get(key), now.get(key), there)
    elif before != now:
        yield path, before, now


def compilers() -> str:
    """Versions of JAX, which lowers, and of libtpu, which compiles."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))


def held() -> dict[str, Any]:
    """The file's figures by compiler versions (oldest first), target and kernel."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def worse(before: Any, now: Any) -> bool:
    """Whether a number grew by more than ``TOLERANCE``, or is missing now."""
    if before is None:
        return False
    return not isinstance(now, int) or now > before * (1 + TOLERANCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, and with ``--write`` updates the file.

    Returns:
        0; without ``--write`` 1 if something got worse.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the file")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    content = held()
    now: dict[str, Any] = {}
    each = [(target, name) for target in given.target for name in KERNELS]
    for target, name in track(each, console=Console(stderr=True), transient=True):
        try:
            now.setdefault(target, {})[name] = numbers(compiled(name, target))
        except CompilerMissing as error:
            console.print(f"benchmarks.tpu_baseline: {error}", markup=False)
            return 1
    ours = compilers()
    by = ours if ours in content else next(reversed(content), ours)
    if by != ours:
        console.print(
            f"The file has no figures of {ours}: these are compared with those of "
            f"{by}: differences may come from the compilers",
            highlight=False,
        )
    known = {target: content.get(by, {}).get(target) for target in given.target}
    bad = 0
    for path, old, new in differences(known, now):
        mark = "worse" if worse(old, new) else "differs"
        bad += mark == "worse"
        console.print(f"{mark}: {path}: {old} -> {new}", highlight=False)
    if given.write:
        content[ours] = {**content.get(ours, {}), **now}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(FILE, text.encode())
        console.print(f"written: {FILE.name}")
        return 0
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
