"""``attnlab tune``: the best sizes of blocks, as a table that attnlab reads.

On a TPU by time; for one that is not here by the compiler's static cycles.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from attnlab import attention
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.files import write_atomically
from attnlab._src.bench.machine import cores
from attnlab._src.bench.options import whole, writable_folder
from attnlab._src.bench.targets import TOLD, on
from attnlab._src.implementations.pallas_tpu.blocks import (
    VARIABLE,
    Blocks,
    device,
    read,
)

DESCRIPTION = f"""\
The best sizes of blocks for each head size and pass, written as a table: of large
ones each is halved as long as that is cheaper. attnlab uses it where {VARIABLE}
names the file. "here" is the TPU of this machine, measured; another target is one that
need not be here, by its compiler's static cycles."""

HERE = "here"
#: Between which sizes are tried, or with all keys of a block at once. Of more queries
#: the compiler needs minutes, and each attention of a model would.
LEAST, MOST = Blocks(512, 512, 256), Blocks(1024, 2048, 512)


Way = TypeVar("Way")


def near(blocks: Blocks) -> list[Blocks]:
    """With one of the sizes halved, or with all keys at once."""
    halved = [blocks._replace(**{f: getattr(blocks, f) // 2}) for f in Blocks._fields]
    large = [b for b in halved if all(n >= m for n, m in zip(b, LEAST, strict=True))]
    fitting = [b for b in large if b.k % b.chunk == 0]
    return [*fitting, blocks._replace(chunk=blocks.k)]


def by_cycles(spec: Spec, of: str, target: str, blocks: Blocks) -> float | None:
    """Static cycles of a pair of a full block."""
    from attnlab._src.bench.static import per_block

    try:
        found = per_block(spec, blocks, of, target, masked=False)
    except NotImplementedError:  # they do not fit the memory
        return None
    return None if found.cycles is None else found.cycles / (blocks.q * blocks.k)


def by_time(spec: Spec, of: str, blocks: Blocks) -> float | None:
    """Seconds of a pair, on the device that is here."""
    from attnlab._src.bench.static import sized, the_pass
    from attnlab._src.bench.timing import Repeats, interleave

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
        except (NotImplementedError, jax.errors.JaxRuntimeError):
            # They do not fit the memory: as we estimate it, or as it is.
            return None
        timing = interleave({"": lambda: call(*arrays)}, Repeats(seconds=1.0))[""]
    return timing.median / (spec.heads * length**2)


def search(
    measure: Callable[[Way], float | None],
    start: Way,
    near: Callable[[Way], Iterable[Way]],
    at_once: int = 1,
) -> Iterator[tuple[Way, float | None]]:
    """What each way costs that is tried: near the cheapest, until none is cheaper.

    Args:
        measure: asked for the cost of each; None: it does not work.
        start: tried first.
        near: what to try next to a way.
        at_once: how many are measured beside each other: a core for each where
            ``measure`` waits for a compiler, one where it takes times.
    """
    known: dict[Way, float | None] = {}
    front = [start]
    with ThreadPoolExecutor(at_once) as pool:
        while front:
            for way, cost in zip(front, pool.map(measure, front), strict=True):
                known[way] = cost
                yield way, cost
            found = best_of(known.items())
            centres = front if found is None else [found[0]]
            front = [w for c in centres for w in near(c) if w not in known]
            front = list(dict.fromkeys(front))


def best_of(
    costs: Iterable[tuple[Way, float | None]],
) -> tuple[Way, float] | None:
    """The cheapest, and what it costs; None where none works."""
    known = [(way, cost) for way, cost in costs if cost is not None]
    return min(known, key=lambda each: each[1]) if known else None


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
        0; 1 where nothing works; 130 where interrupted.
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
    try:
        with Progress(console=console, transient=True) as progress:
            for size, of in wanted:
                spec = Spec(dtype="bfloat16", heads=1, key_heads=1, head_size=size)
                measure = functools.partial(by_time, spec, of)
                if given.target != HERE:
                    measure = functools.partial(by_cycles, spec, of, given.target)
                at_once = 1 if given.target == HERE else cores()
                tried = search(measure, MOST, near, at_once)
                doing = f"head size {size}, {of}"
                best = best_of(progress.track(tried, description=doing))
                if best is None:
                    why = f"attnlab tune: {doing}: no sizes of blocks work"
                    progress.console.print(why, style="red")
                    continue
                # Written at once, so that an interrupted run keeps its results.
                of_kind.setdefault(str(size), {})[of] = list(best[0])
                text = json.dumps(table, indent=1) + "\n"
                write_atomically(given.out, text.encode())
                found += 1
    except KeyboardInterrupt:
        kept = f"{given.out} keeps what is known" if found else "nothing is known"
        console.print(f"interrupted: {kept}", style="yellow", highlight=False)
        return 130
    if not found:
        return 1
    console.print(f"written: {given.out}", highlight=False)
    return 0
