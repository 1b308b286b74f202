"""How many cycles do the TPU kernels take, compared with JAX's splash attention?

Cycles are the estimates of the TPU's own compiler, which needs no TPU (``pip install -e
".[tpu-aot]"``): use them for ratios. Inputs are bfloat16. For each mask both kernels
have the block sizes that are cheapest for it, out of the same ones; attnlab chooses
them itself. Compiled programs are cached, so that an interrupted run continues where it
was stopped.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from attnlab import cost
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.machine import cores
from attnlab._src.bench.options import whole
from attnlab._src.bench.per_block import per_block, splash_per_block
from attnlab._src.bench.problem import problem, projected_size, sized
from attnlab._src.bench.static import least
from attnlab._src.bench.targets import TOLD, CompilerMissing, on
from attnlab._src.bench.tune import SIDES, Cost, by_cycles, costs
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, Entry
from benchmarks.common import parser, write

PASSES = ("forward", "backward")
MASKS = ("full", "causal", "window")
LENGTHS = (4096, 8192)


def spec_of(head_size: int, **changes: Any) -> Spec:
    return Spec(dtype="bfloat16", heads=1, key_heads=1, head_size=head_size, **changes)


def by_splash(
    spec: Spec, of: str, target: str, fused: bool, blocks: Blocks, masked: bool
) -> Cost:
    """What ``by_cycles`` returns, for splash attention."""
    return splash_per_block(spec, blocks, of, target, masked=masked, fused=fused).known


def rows(
    targets: list[str], head_sizes: list[int], quick: bool
) -> Iterator[dict[str, Any]]:
    """For each TPU, head size and pass: costs of blocks, then cycles of masks."""
    sides = SIDES[-1:] if quick else SIDES
    for target in targets:
        for head_size in head_sizes:
            for of in PASSES[:1] if quick else PASSES:
                spec = spec_of(head_size, pattern="causal")
                label = f"{target} {of} {head_size}"
                measure = functools.partial(by_cycles, spec, of, target)
                ours = entries(measure, sides, of, f"{label}, ours")
                if not ours:
                    print(f"{label}: the compiler gives no cycles")
                    continue
                splash: list[Entry] = []
                # Backward in one kernel or two.
                for fused in (True, False) if of == "backward" else (False,):
                    measure = functools.partial(by_splash, spec, of, target, fused)
                    splash += entries(measure, sides, of, f"{label}, splash")
                yield {
                    "target": target,
                    "pass": of,
                    "head_size": head_size,
                    "ours": ours,
                    "splash": splash,
                    "masks": [
                        compared(head_size, pattern, length, of, target, ours, splash)
                        for length in LENGTHS
                        for pattern in MASKS
                    ],
                }


def entries(
    measure: Any, sides: Sequence[tuple[int, int]], of: str, label: str
) -> list[Entry]:
    """What blocks cost, measured with a progress bar."""
    found = track(
        costs(measure, sides, of, cores()),
        label,
        total=len(sides),
        console=Console(stderr=True),
        transient=True,
    )
    return [entry for entry in found if entry is not None]


def compared(
    head_size: int,
    pattern: str,
    length: int,
    of: str,
    target: str,
    ours: Sequence[Entry],
    splash: Sequence[Entry],
) -> dict[str, Any]:
    """Cycles of a pass with a mask, each kernel with its best blocks."""
    spec = spec_of(head_size, pattern=pattern, length=length)

    def best(given: Sequence[Entry], masks_all: bool) -> tuple[float, Blocks] | None:
        found = []
        for entry in given:
            blocks = entry.blocks
            full, partial = live(spec, target, blocks)
            if masks_all:
                full, partial = 0, full + partial
            side = blocks.q if of == "forward" else blocks.k
            outer = length // side * entry.outer
            total = outer + full * entry.full + partial * entry.partial
            found.append((total, blocks))
        return min(found, default=None)

    own = best(ours, False)
    # Splash attention evaluates such a mask in every live block.
    peer = best(splash, pattern != "full")
    return {
        "mask": pattern,
        "length": length,
        "cycles": own and own[0],
        "blocks": own and own[1],
        "splash_cycles": peer and peer[0],
        "splash_blocks": peer and peer[1],
        "ratio_to_splash": own and peer and own[0] / peer[0],
    }


@functools.cache
def live(spec: Spec, target: str, blocks: Blocks) -> tuple[int, int]:
    """Numbers of full and of partial blocks."""
    shapes, options = problem(spec)
    with on(target), sized(blocks) as ours:
        told = cost(*shapes, **options, implementation=ours.name, platform="tpu")
    return told.blocks_full, told.blocks_partial


def additive(target: str, of: str) -> dict[str, Any] | None:
    """Cycles of the additive score over the least that its tanh needs."""
    spec, blocks = spec_of(64, score="additive"), Blocks(512, 256, 256)
    found = per_block(spec, blocks, of, target, masked=False).cycles
    if found is None:
        return None
    pairs = blocks.q * blocks.k
    bounds = least(spec, of, target, pairs, 0)
    return {
        "target": target,
        "pass": of,
        "hidden_size": projected_size(spec),
        "cycles_per_pair": found / pairs,
        "over_bound": found / max(bounds.values()),
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--target", nargs="+", choices=TOLD, default=TOLD)
    options.add_argument("--head-size", nargs="+", type=whole(1), default=[128, 64])
    given = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        study_all(given)
    except CompilerMissing as error:
        sys.exit(f"benchmarks.tpu: {error}")


def study_all(given: argparse.Namespace) -> None:
    """Prints and writes each row when it is done."""
    inner, hidden = [], []
    for each in rows(given.target, given.head_size, given.quick):
        inner.append(each)
        label = f"{each['target']} {each['pass']}, head size {each['head_size']}"
        for found in each["masks"]:
            print(
                f"{label}: {found['mask']}, {found['length']:,}: "
                f"{found['cycles']:,.0f} cycles, "
                f"{found['ratio_to_splash'] or float('nan'):.2f}x splash"
            )
        write(given.out, "tpu", {"inner": inner, "additive": hidden}, quiet=True)
    for target in given.target:
        for of in PASSES[:1] if given.quick else PASSES:
            found = additive(target, of)
            if found is not None:
                hidden.append(found)
                print(f"{target} {of}, additive: {found['over_bound']:.2f}x its bound")
    write(given.out, "tpu", {"inner": inner, "additive": hidden})


if __name__ == "__main__":
    main()
