"""``attnlab tune``: measures what blocks cost, as a table that attnlab reads.

On a TPU they are timed; without one, the compiler's static cycles are taken.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    Entry,
    device,
    read,
)

DESCRIPTION = f"""\
Measures what a block costs, with and without a mask, for block sizes from 256 x 256 to
1,024 x 1,024, and writes the costs as a table. From these, attnlab chooses the sizes
of each call: those that are cheapest for the blocks that its mask leaves alive. It uses
the table if the environment variable {VARIABLE} names the file. The target "here" is
the TPU of this machine, which is timed; other targets need no device and are compared
by their compiler's static cycles."""

HERE = "here"
#: Queries and keys of the blocks. Larger ones save little, but the compiler's profiles
#: of them take minutes; smaller ones cost as much as the smallest of these.
SIDES = ((1024, 1024), (1024, 512), (512, 512), (512, 256), (256, 512), (256, 256))
#: Masks whose block sizes are shown, at this length.
SHOWN, LENGTH = ("full", "causal", "window", "big_bird", "documents"), 8192

#: Cost of a live block and of an outer block; None if the blocks do not work.
Cost = tuple[float, float] | None
Measure = Callable[[Blocks, bool], Cost]


def by_cycles(spec: Spec, of: str, target: str, blocks: Blocks, masked: bool) -> Cost:
    """Static cycles of a live block and of an outer block; None if there are none."""
    from attnlab._src.bench.per_block import per_block

    try:
        return per_block(spec, blocks, of, target, masked=masked).known
    except NotImplementedError:  # the blocks exceed the memory
        return None


def by_time(spec: Spec, of: str, blocks: Blocks, masked: bool) -> Cost:
    """Measured seconds, as ``by_cycles``; None if the blocks exceed the memory."""
    from attnlab._src.bench.every_block import EveryBlock
    from attnlab._src.bench.per_block import slopes
    from attnlab._src.bench.problem import problem, sized, the_pass
    from attnlab._src.bench.timing import Repeats, interleave

    _, options = problem(spec)
    mask = EveryBlock(options["mask"]) if masked else None

    def seconds(queries: int, keys: int) -> float | None:
        shapes = [(1, n, spec.heads, spec.head_size) for n in (queries, keys, keys)]
        arrays = [
            jax.random.normal(jax.random.key(n), shape, jnp.dtype(spec.dtype))
            for n, shape in enumerate(shapes)
        ]
        with sized(blocks) as ours:
            attend = functools.partial(attention, mask=mask, implementation=ours.name)
            call = jax.jit(the_pass(attend, of))
            try:
                jax.block_until_ready(call(*arrays))
            except (NotImplementedError, jax.errors.JaxRuntimeError):
                # The blocks exceed the memory, by our estimate or in fact.
                return None
            timed = interleave({"": lambda: call(*arrays)}, Repeats(seconds=0.5))
        return timed[""].median

    block, outer = slopes(blocks, of, seconds, length=4096)
    return None if block is None or outer is None else (block, outer)


def costs(
    measure: Measure, sides: Sequence[tuple[int, int]], of: str, at_once: int = 1
) -> Iterator[Entry | None]:
    """What blocks cost, with as many keys at once as is cheapest for each.

    Args:
        measure: returns the cost of blocks, without or with a mask.
        sides: queries and keys of the blocks.
        of: "forward" or "backward".
        at_once: how many are measured in parallel: one per core if ``measure`` waits
            for a compiler, 1 if it measures time.

    Yields:
        An entry of the table for each of ``sides``; None if the blocks do not work.
    """

    def one(side: tuple[int, int]) -> Entry | None:
        q, k = side
        # The forward pass computes logits of a part beside the sums of the one before.
        chunks = {256, k // 2 if of == "forward" else k}
        tried = [Blocks(q, k, chunk) for chunk in sorted(chunks)]
        found = {blocks: measure(blocks, False) for blocks in tried}
        working = {blocks: cost for blocks, cost in found.items() if cost is not None}
        if not working:
            return None
        best = min(working, key=lambda blocks: working[blocks][0])
        full, outer = working[best]
        cut = measure(best, True)
        return None if cut is None else Entry(best, outer, full, cut[0])

    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(one, sides)


def chosen(spec: Spec, of: str, table: Sequence[Entry]) -> dict[str, Blocks]:
    """The block sizes that masks get from the entries of a table."""
    from attnlab._src.bench.problem import problem
    from attnlab._src.implementations.pallas_tpu import PallasTpu
    from attnlab._src.ops.explain import canonical
    from attnlab._src.ops.validate import Options

    class Tuned(PallasTpu):
        pass

    Tuned.table = tuple(table)
    found = {}
    for pattern in SHOWN:
        shapes, options = problem(
            dataclasses.replace(spec, pattern=pattern, length=LENGTH)
        )
        query, key, value = shapes
        *_, inputs = canonical(query, key, value, Options(**options))
        found[pattern] = Tuned().sizes(inputs, of)
    return found


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
    from rich.table import Table

    console = Console(stderr=True)
    if given.target == HERE and jax.default_backend() != "tpu":
        console.print(
            f"attnlab tune: --target here: expected a TPU, found "
            f"{jax.default_backend()}; targets without a TPU: {', '.join(TOLD)}",
            style="red",
            highlight=False,
        )
        return 1
    table: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    if given.out.exists():
        table = json.loads(given.out.read_text())
    wanted = [(size, of) for size in given.head_size for of in ("forward", "backward")]
    here = given.target == HERE
    with contextlib.nullcontext() if here else on(given.target):
        kind = device().kind
    assert kind is not None
    of_kind = table.setdefault(kind, {})
    shown: list[tuple[str, ...]] = []
    try:
        with Progress(console=console, transient=True) as progress:
            for size, of in wanted:
                spec = Spec(
                    pattern="causal",
                    dtype="bfloat16",
                    heads=1,
                    key_heads=1,
                    head_size=size,
                )
                measure: Measure = functools.partial(by_time, spec, of)
                if not here:
                    measure = functools.partial(by_cycles, spec, of, given.target)
                tried = costs(measure, SIDES, of, 1 if here else cores())
                doing = f"head size {size}, {of}"
                rows = progress.track(tried, total=len(SIDES), description=doing)
                entries = [x for x in rows if x is not None]
                if not entries:
                    why = f"attnlab tune: {doing}: no block sizes work"
                    progress.console.print(why, style="red")
                    continue
                # Those that are best for full attention come first.
                entries.sort(key=lambda x: x.full / (x.blocks.q * x.blocks.k))
                # Written at once, so that an interrupted run keeps its results.
                of_kind.setdefault(str(size), {})[of] = [
                    [*x.blocks, *(float(f"{cost:.5g}") for cost in x[1:])]
                    for x in entries
                ]
                text = json.dumps(table, indent=1) + "\n"
                write_atomically(given.out, text.encode())
                with contextlib.nullcontext() if here else on(given.target):
                    sizes = chosen(spec, of, entries)
                shown.append((doing, *("x".join(map(str, sizes[m])) for m in SHOWN)))
    except KeyboardInterrupt:
        kept = f"{given.out} keeps what is known" if shown else "nothing is known"
        console.print(f"interrupted: {kept}", style="yellow", highlight=False)
        return 130
    if not shown:
        return 1
    lines = Table(title=f"queries x keys x keys at once, T = {LENGTH:,}")
    for name in ("", *SHOWN):
        lines.add_column(name)
    for line in shown:
        lines.add_row(*line)
    Console().print(lines)
    console.print(f"written: {given.out}", highlight=False)
    return 0
