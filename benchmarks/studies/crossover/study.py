"""From which length, and below which density, is a sparse pattern faster?"""

import datetime as dt
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track
from scipy.optimize import nnls

from attnlab import attention, cost
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.contenders import Prepared, compile_call
from attnlab._src.bench.machine import machine_line, versions
from attnlab._src.bench.static import row as static_row
from attnlab._src.bench.targets import CompilerMissing
from attnlab._src.bench.timing import Repeats, interleave
from attnlab._src.files import write_atomically
from attnlab._src.implementations.measured import Fit
from attnlab._src.implementations.tiled import Tiled
from attnlab._src.ops.prepare import prepare
from attnlab._src.ops.validate import check
from attnlab._src.types import AttentionInputs
from benchmarks.studies.crossover.cases import (
    DIRECTIONS,
    HEAD_SIZE,
    HEADS,
    TARGET,
    TPU_LENGTHS,
    TPU_PATTERNS,
    Case,
    groups_of,
)
from benchmarks.studies.crossover.page import page
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.page import Page
from benchmarks.studies.machinery.record import Json, as_json, read_json


def measure(cases: Sequence[Case], repeats: Repeats) -> dict[str, Json]:
    """Time, memory and work of cases of one length, by name of the case.

    They are measured forward and in training (forward and backward), all in turns, so
    that ratios do not depend on when a case was measured.
    """
    random = np.random.default_rng(0)
    shape = (1, cases[0].length, HEADS, HEAD_SIZE)
    query, key, value, above = (
        jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(4)
    )

    def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> jax.Array:
        return attention(query, key, value, mask=mask)

    prepared: dict[tuple[str, str], Prepared] = {
        (case.name, direction): compile_call(
            function,
            (query, key, value, (), case.mask),
            above if direction == "training" else None,
        )
        for case in cases
        for direction in DIRECTIONS
    }
    timings = interleave({name: p.call for name, p in prepared.items()}, repeats)
    rows = {}
    for case in cases:
        price = cost(query, key, value, mask=case.mask)
        of = {d: timings[case.name, d] for d in DIRECTIONS}
        rows[case.name] = {
            "series": case.series,
            "length": case.length,
            "density": case.mask.density(case.length),
            "implementation": price.implementation,
            "pairs_executed": price.pairs_executed,
            "blocks": price.blocks_full + price.blocks_partial,
            "seconds": {d: t.median for d, t in of.items()},
            "quantiles": {d: [t.low, t.high] for d, t in of.items()},
            "temporary_bytes": {
                d: prepared[case.name, d].temporary_bytes for d in DIRECTIONS
            },
        }
    return rows


#: Tiles of pure XLA whose rates are measured: (queries, keys in a block, keys at once).
#: Large ones are measured as in dense attention, where each block of queries has many;
#: small ones as in a window, where it has one.
LARGE = ((1024, 512, 1024), (512, 512, 1024), (256, 128, 1024))
SMALL = ((256, 512, 512), (256, 256, 256), (256, 128, 128))


def tile_rates(length: int, repeats: Repeats) -> list[tuple[int, float]]:
    """(area of a tile, GFLOP/s) for tiles of pure XLA, all measured in turns."""
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(random.standard_normal((1, length, HEADS, HEAD_SIZE), np.float32))
        for _ in range(3)
    )

    def call(tile: tuple[int, int, int]) -> Callable[[], jax.Array]:
        class Sized(Tiled):
            def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
                return tile[:2]

        @jax.jit
        def run(query: Any, key: Any, value: Any) -> jax.Array:
            inputs = prepare(*check(query, key, value))
            return Sized().forward(inputs)[0]

        keys = length if tile in LARGE else tile[2]
        return lambda: run(query, key[:, :keys], value[:, :keys])

    timings = interleave({tile: call(tile) for tile in (*LARGE, *SMALL)}, repeats)
    flops = 4 * HEADS * HEAD_SIZE * length / 1e9
    return [
        (
            tile[0] * tile[2],
            flops * (length if tile in LARGE else tile[2]) / timing.median,
        )
        for tile, timing in timings.items()
    ]


def on_tpu() -> list[Json]:
    """Cycles of the forward pass on ``TARGET``, by pattern and length.

    Raises:
        CompilerMissing: if the TPU's compiler is not installed.
    """
    rows: list[Json] = []
    for pattern in TPU_PATTERNS:
        for length in TPU_LENGTHS:
            spec = Spec(pattern=pattern, dtype="bfloat16", length=length, head_size=128)
            found = static_row(spec, "forward", TARGET)
            rows.append({
                "pattern": pattern,
                "length": length,
                "cycles": found.cycles,
                "live": found.full + found.partial,
                "blocks": found.blocks._asdict(),
            })
    return rows


def for_dispatch(
    fits: dict[str, Fit], rates: Sequence[tuple[int, float]], implementation: str
) -> Json:
    """The file that :mod:`attnlab._src.implementations.measured` reads."""
    # Tiles smaller than the smallest are taken to be as fast as that.
    (_, least), *others = sorted(rates)
    ranked = [*reversed(others), (0, least)]
    date = dt.datetime.now(dt.UTC).date().isoformat()
    return {
        "where": f"{machine_line()}, {date}",
        "fits": {implementation: {d: f._asdict() for d, f in fits.items()}},
        "tile_rates": ranked,
    }


def fit(rows: Sequence[Json], direction: str) -> Fit:
    """Least squares of the relative errors, with non-negative coefficients."""
    work = np.array([
        [1, row["length"] * HEADS, row["pairs_executed"], row["blocks"]] for row in rows
    ])
    seconds = np.array([row["seconds"][direction] for row in rows])
    found, _ = nnls(work / seconds[:, None], np.ones(len(rows)))
    errors = np.abs(work @ found / seconds - 1)
    call, query, pair, block = found.tolist()
    worst = float(errors.max())
    return Fit(call, query, pair, block, float(np.median(errors)), worst)


class Measurements:
    """The measurements so far, on disk, with what identifies them."""

    def __init__(self, context: Context):
        """Reads the file if the study is resumed, otherwise starts anew.

        Raises:
            StudyError: if the file is of other sizes, masks, or another machine.
        """
        self._path = context.folder / "rows.json"
        groups = groups_of(context.quick)
        identity: Json = {
            "heads": [HEADS, HEAD_SIZE],
            "masks": {case.name: repr(case.mask) for g in groups for case in g},
            "machine": machine_line(),
            "versions": versions(),
            "devices": context.mesh.size,
        }
        found = read_json(self._path) if context.resume else None
        if found is not None and found["identity"] != json.loads(as_json(identity)):
            raise StudyError(
                f"{self._path} has measurements of other cases or of another machine; "
                "run without --resume to measure anew, or give another --out"
            )
        self.content: Json = found or {"identity": identity}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The measurement of that name; measured now if it is not in the file."""
        if name not in self.content:
            self.content[name] = measure()
            write_atomically(self._path, as_json(self.content).encode())
        return self.content[name]


def study(context: Context) -> Page:
    """Measures what is not measured yet, then fits the times.

    It also writes ``measured.json``, next to the page, which
    ``attnlab._src.implementations.measured`` can read.
    """
    kept = Measurements(context)
    repeats = Repeats(3, 3) if context.quick else Repeats(7, 15, 60, settle=0.02)
    groups = groups_of(context.quick)
    rows: list[Json] = []
    for group in track(groups, "measuring", console=context.console):
        name = f"T = {group[0].length}"
        rows += kept.once(name, lambda group=group: measure(group, repeats)).values()
    length = 1024 if context.quick else 4096
    rates = kept.once("tiles", lambda: tile_rates(length, repeats))
    tpu = None
    if not context.quick:
        try:
            tpu = kept.once("tpu", on_tpu)
        except CompilerMissing as error:
            context.say(f"no TPU cycles: {error}")
    fits = {direction: fit(rows, direction) for direction in DIRECTIONS}
    (implementation,) = {row["implementation"] for row in rows}
    dispatch = for_dispatch(fits, rates, implementation)
    write_atomically(context.out / "measured.json", as_json(dispatch).encode())
    return page(rows, fits, rates, tpu)
