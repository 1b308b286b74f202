"""``attnlab tune``: the best sizes of blocks, as a table that attnlab reads.

On a TPU by time; for one that is not here by the compiler's static cycles.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import attention
from attnlab.bench.cases import Spec
from attnlab.bench.files import write_atomically
from attnlab.bench.machine import cores
from attnlab.bench.options import whole, writable_folder
from attnlab.bench.targets import TOLD, on
from attnlab.implementations.pallas_tpu.blocks import VARIABLE, Blocks, device, read

DESCRIPTION = f"""\
The best sizes of blocks for each head size and pass, written as a table. attnlab uses
it where {VARIABLE} names the file. "here" is the TPU of this machine, measured; another
target is one that need not be here, by its compiler's static cycles."""

HERE = "here"
#: What is tried: queries, keys, and keys at once. Of more queries the compiler needs
#: minutes, and each attention of a model would.
_SIZES, _KEYS, _CHUNKS = (512, 1024), (512, 1024, 2048), (256, 512)

#: ``measure(blocks) -> cost of a pair``, None where they do not work.
Measure = Callable[[Blocks], float | None]


def candidates() -> list[Blocks]:
    """Sizes to try."""
    tried = itertools.product(_SIZES, _KEYS, _CHUNKS)
    return [Blocks(q, k, chunk) for q, k, chunk in tried if k % chunk == 0]


def by_cycles(spec: Spec, of: str, target: str, blocks: Blocks) -> float | None:
    """Static cycles of a pair of a full block."""
    from attnlab.bench.static import per_block

    try:
        found = per_block(spec, blocks, of, target, masked=False)
    except NotImplementedError:  # they do not fit the memory
        return None
    return None if found.cycles is None else found.cycles / (blocks.q * blocks.k)


def by_time(spec: Spec, of: str, blocks: Blocks) -> float | None:
    """Seconds of a pair, on the device that is here."""
    from attnlab.bench.static import sized, the_pass
    from attnlab.bench.timing import Repeats, interleave

    length = math.lcm(blocks.q, blocks.k) * 4
    shape = (1, length, spec.heads, spec.head_size)
    arrays = [
        jax.random.normal(jax.random.key(n), shape, jnp.dtype(spec.dtype))
        for n in range(3)
    ]
    with sized(blocks) as ours:
        attend = functools.partial(attention, implementation=ours.name)
        call = jax.jit(the_pass(attend, of))
        try:
            jax.block_until_ready(call(*arrays))
        except jax.errors.JaxRuntimeError:  # they do not fit the memory
            return None
        timing = interleave({"": lambda: call(*arrays)}, Repeats(seconds=1.0))[""]
    return timing.median / (spec.heads * length**2)


def costs(
    measure: Measure, sizes: Sequence[Blocks], at_once: int = 1
) -> Iterator[tuple[Blocks, float | None]]:
    """What a pair costs with each of some sizes.

    Args:
        measure: asked for each.
        sizes: to try.
        at_once: how many are measured beside each other: a core for each where
            ``measure`` waits for a compiler, one where it takes times.
    """
    with ThreadPoolExecutor(at_once) as pool:
        yield from zip(sizes, pool.map(measure, sizes), strict=True)


def best_of(
    costs: Iterable[tuple[Blocks, float | None]],
) -> tuple[Blocks, float] | None:
    """The cheapest sizes, and what a pair costs; None where none work."""
    known = [(cost, blocks) for blocks, cost in costs if cost is not None]
    if not known:
        return None
    cost, blocks = min(known)
    return blocks, cost


def _table(text: str) -> Path:
    """A file that can be written, and is a table if it is there."""
    path = Path(text)
    try:
        if path.exists():
            read(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    writable_folder(str(path.parent))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--target", choices=(HERE, *TOLD), default=HERE, help="which TPU (here)")
    add(
        "--head-size",
        nargs="+",
        type=whole(1),
        default=[64, 128, 256],
        help="head sizes (64 128 256)",
    )
    add(
        "--out",
        type=_table,
        required=True,
        metavar="FILE.json",
        help="the table: other generations in it are kept",
    )


def command(given: argparse.Namespace) -> int:
    """Tries, and writes the table.

    Args:
        given: the options.

    Returns:
        0; 1 where nothing works.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if given.target == HERE and jax.default_backend() != "tpu":
        console.print(
            f"attnlab tune: --target here: expected a TPU, found "
            f"{jax.default_backend()}; without one: {', '.join(TOLD)}",
            style="red",
            highlight=False,
        )
        return 1
    table: dict[str, Any] = {}
    if given.out.exists():
        table = json.loads(given.out.read_text())
    wanted = [(size, of) for size in given.head_size for of in ("forward", "backward")]
    if given.target == HERE:
        kind = device().kind
    else:
        with on(given.target):
            kind = device().kind
    assert kind is not None
    of_kind: dict[str, Any] = table.setdefault(kind, {})
    found = 0
    with Progress(console=console, transient=True) as progress:
        for size, of in wanted:
            spec = Spec(dtype="bfloat16", heads=1, key_heads=1, head_size=size)
            sizes = candidates()
            if given.target == HERE:
                tried = costs(functools.partial(by_time, spec, of), sizes)
            else:
                measure = functools.partial(by_cycles, spec, of, given.target)
                tried = costs(measure, sizes, at_once=cores())
            best = best_of(
                progress.track(tried, len(sizes), description=f"head size {size}, {of}")
            )
            if best is None:
                progress.console.print(
                    f"attnlab tune: head size {size}, {of}: no sizes of blocks work",
                    style="red",
                )
                continue
            # At once, so that whoever stops it keeps what is known.
            of_kind.setdefault(str(size), {})[of] = list(best[0])
            text = json.dumps(table, indent=1) + "\n"
            write_atomically(given.out, text.encode())
            found += 1
    if not found:
        return 1
    console.print(f"written: {given.out}", highlight=False)
    return 0
