"""Do the TPU kernels still compile as well as they did?

Compiles a set of kernels for every generation of TPUs, with the TPU's own compiler and
no TPU (``pip install "attnlab[tpu-aot]"``), and holds cycles, spills and vector memory
to the file beside the other results: 3 % more of any of them is a failure. XLA decides
where a kernel's arrays lie, from what is around it: a kernel reads and writes them
faster in vector memory. So another program around the same kernel may change cycles and
memory; its spills stay. The file has figures for each version of JAX and of the
compiler; a version that it does not have yet is held to the newest that it has.

    python -m benchmarks.tpu_baseline            compares
    python -m benchmarks.tpu_baseline --write    shows what changed, and writes it down
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
from attnlab._src.bench.files import write_atomically
from attnlab._src.bench.static import problem, sized, the_pass
from attnlab._src.bench.targets import TARGETS, CompilerMissing, Study, study
from attnlab._src.implementations.pallas_tpu.blocks import Blocks

FILE = Path(__file__).parent / "results" / "tpu_baseline.json"
#: What may be more, and by how much of it.
NUMBERS, TOLERANCE = ("cycles", "spills", "memory"), 0.03
BLOCKS = Blocks(512, 512, 256)


_SMALL = Spec(dtype="bfloat16", length=1024, heads=1, key_heads=1, head_size=128)

#: By name: pass and problem.
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

    # Whatever JAX is set to: as a training job has it.
    with sized(BLOCKS) as ours, jax.default_matmul_precision("default"):
        return study(the_pass(attend, of), *shapes, target=target, cache=cache)


def numbers(found: Study) -> dict[str, dict[str, int | None]]:
    """What is held, by kernel of ours."""
    return {
        kernel.name.split(".")[0]: {n: getattr(kernel, n) for n in NUMBERS}
        for kernel in found.kernels
        if kernel.name.startswith("attnlab")
    }


def differences(
    before: Any, now: Any, path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Every number that is not what it was, with where it stands."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            there = f"{path}: {key}" if path else key
            yield from differences(before.get(key), now.get(key), there)
    elif before != now:
        yield path, before, now


def compilers() -> str:
    """Versions of what lowers and compiles."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))


def held() -> dict[str, Any]:
    """The file: by versions of the compilers, by target, by kernel; oldest first."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def worse(before: Any, now: Any) -> bool:
    """Whether a number grew by more than is tolerated, or is there no more."""
    if before is None:
        return False
    return not isinstance(now, int) or now > before * (1 + TOLERANCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, or writes.

    Returns:
        0; 1 where something got worse.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the file anew")
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
            f"{by}, and differences may be the compilers'",
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
