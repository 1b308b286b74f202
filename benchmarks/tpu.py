"""How many cycles do the TPU kernels take, beside those of JAX's splash attention?

Their static schedules, as the TPU's own compiler tells them, with no TPU (``pip
install -e ".[tpu-aot]"``): estimates, for ratios. bfloat16, each kernel at the best of
the same sizes of blocks. What was compiled is kept, so that a second call goes on where
the first was stopped.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from attnlab.bench.cases import Spec
from attnlab.bench.machine import cores
from attnlab.bench.options import whole
from attnlab.bench.static import least, per_block, projected_size, row, splash_per_block
from attnlab.bench.targets import TOLD, CompilerMissing
from attnlab.bench.tune import best_of, by_cycles, candidates, costs
from attnlab.implementations.pallas_tpu.blocks import Blocks
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


def by_splash(spec: Spec, of: str, target: str, blocks: Blocks) -> float | None:
    """Cycles of a pair of a full block."""
    found = splash_per_block(spec, blocks, of, target, masked=False)
    return None if found is None else found / (blocks.q * blocks.k)


def rows(
    targets: list[str], head_sizes: list[int], quick: bool
) -> Iterator[dict[str, Any]]:
    """Of each TPU, head size and pass: full blocks, then what masks add."""
    sizes = candidates()[:1] if quick else candidates()
    console = Console(stderr=True)
    for target in targets:
        for head_size in head_sizes:
            for of in PASSES[:1] if quick else PASSES:
                spec, label = spec_of(head_size), f"{target} {of} {head_size}"
                found = {
                    name: best_of(
                        track(
                            costs(
                                functools.partial(measure, spec, of, target),
                                sizes,
                                at_once=cores(),
                            ),
                            f"{label}, {name}",
                            total=len(sizes),
                            console=console,
                            transient=True,
                        )
                    )
                    for name, measure in (("ours", by_cycles), ("splash", by_splash))
                }
                ours, splash = found["ours"], found["splash"]
                if ours is None:
                    print(f"{label}: the compiler tells no cycles")
                    continue
                yield {
                    "target": target,
                    "pass": of,
                    "head_size": head_size,
                    **{
                        name: best and {"blocks": best[0], "cycles_per_pair": best[1]}
                        for name, best in found.items()
                    },
                    "ratio": splash and ours[1] / splash[1],
                    "masks": {
                        pattern: masked(spec, pattern, of, target, ours[0])
                        for pattern in ("causal", "window")
                    },
                }


def masked(
    spec: Spec, pattern: str, of: str, target: str, blocks: Blocks
) -> dict[str, Any]:
    """A block that the mask cuts beside a full one, and the whole beside splash's."""
    found = row(dataclasses.replace(spec, pattern=pattern), of, target, blocks=blocks)
    full = per_block(spec, blocks, of, target, masked=False).cycles
    cut = found.block_cycles[1]
    return {
        "partial_over_full": cut / full if cut and full else None,
        "ratio_to_splash": found.ratio_to_splash,
    }


def additive(target: str, of: str) -> dict[str, Any] | None:
    """Cycles of the additive score beside what its tanh needs at least."""
    spec, blocks = spec_of(64, score="additive"), Blocks(512, 512, 256)
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
    """Says and writes each row as it comes."""
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
