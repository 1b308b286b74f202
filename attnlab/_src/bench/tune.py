"""``attnlab tune``: finds the best block sizes, as a table that attnlab reads.

On a TPU they are measured; without one, the compiler's static cycles are compared.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp

from attnlab import attention
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.machine import cores
from attnlab._src.bench.options import whole, writable_folder
from attnlab._src.bench.targets import TOLD, on
from attnlab._src.files import write_atomically
from attnlab._src.implementations.pallas_tpu.blocks import (
    VARIABLE,
    Blocks,
    device,
    read,
)

DESCRIPTION = f"""\
Finds the best block sizes for each head size and pass, and writes them as a table. The
search starts from large sizes and halves one of them as long as that is cheaper.
attnlab uses the table if the environment variable {VARIABLE} names the file. The target
"here" is the TPU of this machine, which is timed; other targets need no device and are
compared by their compiler's static cycles."""

HERE = "here"
#: Limits of the sizes that are tried (besides all keys of a block at once). With more
#: queries compilation takes minutes, for each attention of a model.
LEAST, MOST = Blocks(512, 512, 256), Blocks(1024, 2048, 512)


Way = TypeVar("Way")


def near(blocks: Blocks) -> list[Blocks]:
    """The block sizes with one of them halved, and with all keys at once."""
    halved = [blocks._replace(**{f: getattr(blocks, f) // 2}) for f in Blocks._fields]
    large = [b for b in halved if all(n >= m for n, m in zip(b, LEAST, strict=True))]
    fitting = [b for b in large if b.k % b.chunk == 0]
    return [*fitting, blocks._replace(chunk=blocks.k)]


def by_cycles(spec: Spec, of: str, target: str, blocks: Blocks) -> float | None:
    """Static cycles per pair in a full block; None if there are none."""
    from attnlab._src.bench.static import per_block

    try:
        found = per_block(spec, blocks, of, target, masked=False)
    except NotImplementedError:  # the blocks exceed the memory
        return None
    return None if found.cycles is None else found.cycles / (blocks.q * blocks.k)


def by_time(spec: Spec, of: str, blocks: Blocks) -> float | None:
    """Measured seconds per pair on this device; None if the blocks exceed memory."""
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
            # The blocks exceed the memory, by our estimate or in fact.
            return None
        timing = interleave({"": lambda: call(*arrays)}, Repeats(seconds=1.0))[""]
    return timing.median / (spec.heads * length**2)


def search(
    measure: Callable[[Way], float | None],
    start: Way,
    near: Callable[[Way], Iterable[Way]],
    at_once: int = 1,
) -> Iterator[tuple[Way, float | None]]:
    """Local search: tries what is near the cheapest, until none of it is cheaper.

    Args:
        measure: returns the cost of a candidate; None if it does not work.
        start: the first candidate.
        near: returns the candidates near another one.
        at_once: how many are measured in parallel: one per core if ``measure`` waits
            for a compiler, 1 if it measures time.

    Yields:
        Each candidate and its cost.
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
    """The cheapest candidate and its cost; None if none works."""
    known = [(way, cost) for way, cost in costs if cost is not None]
    return min(known, key=lambda each: each[1]) if known else None


def _table(text: str) -> Path:
    """An argparse type: a file that can be written to; if it exists, it is a table."""
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
        help="file of the table; entries of other TPU generations are kept",
    )


def command(given: argparse.Namespace) -> int:
    """Runs ``attnlab tune``.

    Args:
        given: the options.

    Returns:
        The exit status: 0; 1 if no block sizes work; 130 if interrupted.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if given.target == HERE and jax.default_backend() != "tpu":
        console.print(
            f"attnlab tune: --target here: expected a TPU, found "
            f"{jax.default_backend()}; targets without a TPU: {', '.join(TOLD)}",
            style="red",
            highlight=False,
        )
        return 1
    table: dict[str, dict[str, dict[str, list[int]]]] = {}
    if given.out.exists():
        table = json.loads(given.out.read_text())
    wanted = [(size, of) for size in given.head_size for of in ("forward", "backward")]
    if given.target == HERE:
        kind = device().kind
    else:
        with on(given.target):
            kind = device().kind
    assert kind is not None
    of_kind = table.setdefault(kind, {})
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
                    why = f"attnlab tune: {doing}: no block sizes work"
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
