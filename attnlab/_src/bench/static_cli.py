"""The command ``attnlab static``: options, tables and output file."""

import argparse
import dataclasses
import datetime as dt
import json
import shlex
from collections.abc import Sequence
from typing import Any

import jax

from attnlab._src.bench.cases import PATTERNS, SCORES, Spec
from attnlab._src.bench.expression import read_mask
from attnlab._src.bench.gpus import CARDS
from attnlab._src.bench.machine import machine_line, versions
from attnlab._src.bench.options import writable_folder
from attnlab._src.bench.targets import TARGETS
from attnlab._src.files import write_atomically

DESCRIPTION = """\
Estimates the cost of attention on a TPU or GPU, without having one. The TPU's own
compiler (extra "tpu-aot") reports the cycles of a block, the plan the number of blocks.
NVIDIA's assembler (extra "gpu-aot") reports registers, spills, instructions, and stall
counts of a block. These are static estimates: compare them with each other; they are
not times."""

#: Letters of --shape, and the fields of ``Spec`` they stand for.
_LETTERS = {
    "b": "batch",
    "t": "query_length",
    "s": "length",
    "n": "heads",
    "k": "key_heads",
    "h": "head_size",
}


def pattern(text: str) -> str:
    """An argparse type: a name in ``PATTERNS``, or an expression of masks."""
    if text in PATTERNS:
        return text
    try:
        read_mask(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(PATTERNS)}, or masks as in Python: {error}"
        ) from None
    return text


def shape(text: str) -> dict[str, int]:
    """An argparse type: ``b=1,t=4096,n=8,h=128`` as fields of ``Spec``."""
    found: dict[str, int] = {}
    for part in text.split(","):
        letter, _, number = part.partition("=")
        if letter not in _LETTERS or not number.isdigit() or int(number) < 1:
            raise argparse.ArgumentTypeError(
                f"expected letters of {','.join(_LETTERS)} with sizes, as in "
                f"b=1,t=4096,n=8,h=128, got {part!r}"
            )
        found[_LETTERS[letter]] = int(number)
    found.setdefault("length", found.get("query_length", 4096))
    found.setdefault("query_length", found["length"])
    found.setdefault("heads", 1)
    found.setdefault("key_heads", found["heads"])
    found.setdefault("head_size", 128)
    if found["heads"] % found["key_heads"]:
        raise argparse.ArgumentTypeError(
            f"k={found['key_heads']} does not divide n={found['heads']}"
        )
    return found


def sizes(text: str) -> tuple[int, int, int]:
    """An argparse type: block sizes ``1024x1024x512``: queries, keys, keys at once."""
    parts = text.split("x")
    numbers = [int(p) for p in parts if p.isdigit()]
    if len(parts) != 3 or len(numbers) != 3:
        raise argparse.ArgumentTypeError(
            f"expected queries x keys x keys at once, as in 1024x1024x512, got {text!r}"
        )
    q, k, chunk = numbers
    if 0 in numbers or q % 128 or chunk % 128 or k % chunk:
        raise argparse.ArgumentTypeError(
            f"{text}: queries and keys at once must be multiples of 128, and keys a "
            "multiple of keys at once"
        )
    return q, k, chunk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add(
        "--target",
        nargs="+",
        choices=(*TARGETS, *CARDS),
        default=["tpu:v5e"],
        help="which TPUs and GPUs (tpu:v5e)",
    )
    add(
        "--shape",
        type=shape,
        default=shape("t=4096"),
        metavar="b=1,t=4096,n=1,h=128",
        help="sizes: b batch, t queries, s keys, n heads, k key heads, h head size",
    )
    add(
        "--mask",
        nargs="+",
        type=pattern,
        default=["full"],
        help=f"{', '.join(PATTERNS)} (full); or masks as in Python, in quotes: "
        "'causal() & (sliding_window(512, 0) | prefix(64))'",
    )
    add(
        "--score",
        nargs="+",
        choices=SCORES,
        default=["scaled_dot"],
        help="scores (scaled_dot)",
    )
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add(
        "--passes",
        nargs="+",
        choices=("forward", "backward"),
        default=["forward"],
        help="which passes (forward); the profile of a backward pass takes a while",
    )
    add(
        "--blocks",
        type=sizes,
        metavar="QxKxC",
        help="block sizes on TPUs: queries, keys, keys at once (from attnlab's table)",
    )
    add(
        "--out",
        type=writable_folder,
        default="attnlab-static",
        metavar="DIR",
        help="folder for the results (attnlab-static)",
    )


def command(given: argparse.Namespace, called: Sequence[str]) -> int:
    """Runs ``attnlab static``.

    Args:
        given: the options.
        called: the whole command line, to be written to the file.

    Returns:
        The exit status: 0; 1 if the compiler reported nothing of a kernel, or a problem
        cannot be computed; 130 if interrupted.
    """
    from rich.console import Console
    from rich.progress import Progress

    from attnlab._src.bench.gpu_static import GpuRow, gpu_row
    from attnlab._src.bench.static import Row, row
    from attnlab._src.implementations.pallas_tpu.blocks import Blocks

    # Nothing runs on a device. With libtpu installed, JAX would look for a TPU and
    # log messages.
    jax.config.update("jax_platforms", "cpu")
    console, messages = Console(), Console(stderr=True)
    blocks = None if given.blocks is None else Blocks(*given.blocks)
    wanted = [
        (target, of, Spec(pattern=m, score=s, dtype=given.dtype, **given.shape))
        for target in given.target
        for m in given.mask
        for s in given.score
        for of in given.passes
    ]
    rows: list[Row | GpuRow] = []
    refused: list[dict[str, Any]] = []
    stopped = False
    try:
        with Progress(console=messages, transient=True) as progress:
            task = progress.add_task("", total=len(wanted))
            for target, of, spec in wanted:
                progress.update(task, description=f"{target} {of} {spec.label}")
                try:
                    if target in CARDS:
                        rows.append(gpu_row(spec, of, target))
                    else:
                        rows.append(row(spec, of, target, blocks=blocks))
                except (NotImplementedError, ValueError) as error:
                    asked = {"spec": dataclasses.asdict(spec), "why": str(error)}
                    refused.append({"target": target, "of": of, **asked})
                    label = f"{target} {of} {spec.label}"
                    said = {"style": "red", "highlight": False, "soft_wrap": True}
                    messages.print(f"{label}: {error}", **said)
                progress.advance(task)
    except KeyboardInterrupt:
        kept = "keeping what is known" if rows else "nothing is known"
        messages.print(f"interrupted: {kept}", style="yellow")
        stopped = True
    if not rows:
        return 130 if stopped else 1
    if not console.is_terminal:
        console = Console(width=160)
    on_gpus = [each for each in rows if isinstance(each, GpuRow)]
    on_tpus = [each for each in rows if isinstance(each, Row)]
    for table, found in ((_table, on_tpus), (_gpu_table, on_gpus)):
        if found:
            console.print(table(found))
    for each in rows:
        if each.why:
            console.print(f"{each.target} {each.of}: {each.why}", highlight=False)
    path = given.out / "static.json"
    content = {
        "command": shlex.join(called),
        "machine": machine_line(),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "complete": not stopped,
        "rows": [*(each.content() for each in rows), *refused],
    }
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    console.print(f"written: {path}", highlight=False)
    if stopped:
        return 130
    nothing = any(each.cycles is None for each in on_tpus)
    nothing |= any(not each.kernels for each in on_gpus)
    return 1 if refused or nothing else 0


def _table(rows: Sequence[Any]) -> Any:
    from rich.table import Table

    table = Table(
        title="cycles of a core, the compiler's static estimate: for ratios, not times"
    )
    for name in ("target", "pass", "mask", "score", "blocks"):
        table.add_column(name)
    numbers = (
        "live", "partial", "cycles", "a 2^20 pairs", "least", "bound by", "spills",
        "VMEM", "x splash",
    )  # fmt: skip
    for name in numbers:
        table.add_column(name, justify="right")
    for each in rows:
        kernel = each.kernel
        live = each.full + each.partial
        pairs = live * each.blocks.q * each.blocks.k / 2**20
        known = each.cycles is not None
        most = max(each.bounds.values())
        table.add_row(
            each.target,
            each.of,
            each.spec.pattern,
            each.spec.score,
            "x".join(map(str, each.blocks)),
            f"{live:,} of {each.total:,}",
            f"{each.partial:,}",
            f"{each.cycles:,.0f}" if known else "-",
            f"{each.cycles / pairs:,.0f}" if known and live else "-",
            f"{most / each.cycles:.0%}" if known and live else f"{most:,.0f}",
            each.binds,
            "-" if kernel is None else f"{kernel.spills:,}",
            "-"
            if kernel is None or kernel.memory is None
            else f"{kernel.memory / 2**20:.1f} MiB",
            "-" if each.ratio_to_splash is None else f"{each.ratio_to_splash:.2f}",
        )
    return table


def _gpu_table(rows: Sequence[Any]) -> Any:
    from rich.table import Table

    table = Table(
        title="compiled, not timed: the assembler's stall counts are no times"
    )
    for name in ("target", "pass", "mask", "kernel"):
        table.add_column(name)
    numbers = (
        "live", "partial", "registers", "spills", "tensor core", "exponential",
        "stalls", "bound by",
    )  # fmt: skip
    for name in numbers:
        table.add_column(name, justify="right")
    for each in rows:
        live = f"{each.full + each.partial:,} of {each.total:,}"
        lead = each.target, each.of, each.spec.pattern
        blocks = live, f"{each.partial:,}"
        for kernel in each.kernels:
            table.add_row(
                *lead,
                kernel.name,
                *blocks,
                f"{kernel.registers}",
                f"{kernel.spills:,}",
                f"{kernel.instructions['tensor core']:,}",
                f"{kernel.instructions['exponential']:,}",
                " / ".join(f"{loop.stalls:,}" for loop in kernel.loops),
                each.binds or "-",
            )
        if not each.kernels:
            table.add_row(
                *lead, each.implementation, *blocks, *"-----", each.binds or "-"
            )
    return table
