"""How many cycles do the TPU kernels take, compared with JAX's splash attention?

Cycles are the estimates of the TPU's own compiler, which needs no TPU (``pip install -e
".[tpu-aot]"``): use them for ratios. Inputs are bfloat16, each kernel has its best
block sizes, and both searches have the same limits. Compiled programs are cached, so
that an interrupted run continues where it was stopped.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import track

from attnlab import cost
from attnlab._src.bench import tune
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.machine import cores
from attnlab._src.bench.options import whole
from attnlab._src.bench.static import (
    least,
    per_block,
    problem,
    projected_size,
    sized,
    splash_per_block,
)
from attnlab._src.bench.targets import TOLD, CompilerMissing, on
from attnlab._src.bench.tune import LEAST, MOST, best_of, by_cycles, search
from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from benchmarks.common import parser, write

PASSES = ("forward", "backward")
LENGTH = 8192


def spec_of(head_size: int, **changes: Any) -> Spec:
    return Spec(
        dtype="bfloat16",
        length=LENGTH,
        heads=1,
        key_heads=1,
        head_size=head_size,
        **changes,
    )


class Way(NamedTuple):
    """Options of splash attention: block sizes, and whether backward is one kernel."""

    blocks: Blocks
    fused: bool


def by_splash(spec: Spec, of: str, target: str, way: Way) -> float | None:
    """Cycles per pair of a full block of splash attention; None: unknown."""
    found = splash_per_block(
        spec, way.blocks, of, target, masked=False, fused=way.fused
    )
    return None if found is None else found / (way.blocks.q * way.blocks.k)


def near(way: Way) -> list[Way]:
    """The options to try next to those of ``way``."""
    found = [way._replace(blocks=b) for b in tune.near(way.blocks)]
    return [*found, way._replace(fused=False)]


def rows(
    targets: list[str], head_sizes: list[int], quick: bool
) -> Iterator[dict[str, Any]]:
    """For each TPU, head size and pass: cycles of full blocks, then with masks."""
    start = LEAST if quick else MOST
    for target in targets:
        for head_size in head_sizes:
            for of in PASSES[:1] if quick else PASSES:
                spec, label = spec_of(head_size), f"{target} {of} {head_size}"
                ours = cheapest(
                    functools.partial(by_cycles, spec, of, target),
                    start,
                    tune.near,
                    f"{label}, ours",
                )
                splash = cheapest(
                    functools.partial(by_splash, spec, of, target),
                    Way(start, of == "backward"),
                    near,
                    f"{label}, splash",
                )
                if ours is None:
                    print(f"{label}: the compiler gives no cycles")
                    continue
                yield {
                    "target": target,
                    "pass": of,
                    "head_size": head_size,
                    "ours": {"blocks": ours[0], "cycles_per_pair": ours[1]},
                    "splash": splash
                    and {**splash[0]._asdict(), "cycles_per_pair": splash[1]},
                    "ratio": splash and ours[1] / splash[1],
                    "masks": {
                        pattern: masked(spec, pattern, of, target, ours, splash)
                        for pattern in ("causal", "window")
                    },
                }


def cheapest(
    measure: Callable[[Any], float | None],
    start: Any,
    near: Callable[[Any], list[Any]],
    label: str,
) -> tuple[Any, float] | None:
    """The cheapest options and their cost, searched with a progress bar."""
    tried = search(measure, start, near, at_once=cores())
    console = Console(stderr=True)
    return best_of(track(tried, label, console=console, transient=True))


def masked(
    spec: Spec,
    pattern: str,
    of: str,
    target: str,
    ours: tuple[Blocks, float],
    splash: tuple[Way, float] | None,
) -> dict[str, Any]:
    """Cycles of partial blocks over full ones, and of the whole over splash's."""
    spec = dataclasses.replace(spec, pattern=pattern)
    blocks, each = ours
    full = each * blocks.q * blocks.k
    cut = per_block(spec, blocks, of, target, masked=True).cycles
    found = {"partial_over_full": cut and cut / full}
    if cut is None or splash is None:
        return found
    (sizes, fused), each = splash
    peer = splash_per_block(spec, sizes, of, target, masked=True, fused=fused)
    if peer is None:
        return found
    counts = live(spec, target, blocks)
    # Splash attention evaluates such a mask in every block.
    whole = peer * sum(live(spec, target, sizes))
    return {
        **found,
        "splash_partial_over_full": peer / (each * sizes.q * sizes.k),
        "ratio_to_splash": (counts[0] * full + counts[1] * cut) / whole,
    }


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
        print(
            f"{each['target']} {each['pass']}, head size {each['head_size']}: "
            f"{each['ours']['cycles_per_pair'] * 2**20:,.0f} cycles a 2^20 pairs, "
            f"{each['ratio'] or float('nan'):.2f}x splash"
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
