"""Law 1: an implementation never changes the mathematics.

Every implementation is compared with the reference (output, log-sum-exp and every
gradient) over a pairwise covering array of the grid. The exact result is the reference
in float64. An error may be at most twice the error of the reference in the same dtypes,
plus rounding.
"""

import concurrent.futures
import itertools
import os
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from attnlab import attention, attention_with_stats
from attnlab._src.checks.compare import compare
from attnlab._src.implementations.native import load
from tests import grid

CELLS = grid.covering()
SAMPLES = grid.sampled(int(os.environ.get("ATTNLAB_SAMPLES", "4")))

#: Levels that the native kernel refuses by design: a user's functions, and float64.
NATIVE_REFUSES = {"own", "stacked", "float64"}

#: Adapters of other libraries, tested without log-sum-exp on the cells that they take.
ADAPTERS = ("jax_nn",)


def evaluate(implementation, dropout_rate, stats):
    """A function of (data, fixed, cotangents): output, lse or None, every gradient."""

    def forward(data, fixed):
        options = dict(
            **data, **fixed, dropout_rate=dropout_rate, implementation=implementation
        )
        if stats:
            return attention_with_stats(**options)[:2]
        return attention(**options), None

    def both(data, fixed, cotangents):
        (output, lse), pull = jax.vjp(lambda data: forward(data, fixed), data)
        (gradients,) = pull((cotangents[0], cotangents[1] if stats else None))
        return dict(output=output, lse=lse, gradients=gradients)

    return both


class Job(NamedTuple):
    """A lowered evaluation and the arguments it was lowered for."""

    lowered: Any
    args: Any
    x64: bool

    def run(self, compiled, args=None):
        with jax.enable_x64(self.x64):
            return jax.block_until_ready(compiled(*(args or self.args)))


def lower(implementation, problem, x64, stats=True):
    args = problem.data, problem.fixed, problem.cotangents
    if implementation == "exact":
        args = *grid.cast(args[:1], np.float64), args[1], grid.cast(args[2], np.float64)
        implementation = "reference"
    with jax.enable_x64(x64):
        made = jax.jit(evaluate(implementation, problem.dropout_rate, stats))
        return Job(made.lower(*args), args, x64)


def once():
    yield


def instructions():
    """Selects each instruction set of this processor in turn."""
    for isa in load.load().isas:
        with load.instructions(isa):
            yield isa


def conform(cell, tile, monkeypatch, ours):
    """Compiles each evaluation once, in parallel, and compares the results.

    Args:
        cell: cell of the grid.
        tile: the fixture.
        monkeypatch: the fixture.
        ours: by implementation, a generator function that selects each setting under
            which the implementation is run.
    """
    problem = grid.build(cell)
    is_exact = cell.dtype == "float64"
    tile(*grid.TILES[cell.tiles])
    jobs = {}
    with monkeypatch.context() as patch:
        # Nothing here is NaN, so dead slots need no treatment. Finding them is half of
        # the compile time, so only a third of the cells do it.
        module = sys.modules["attnlab._src.ops.prepare"]
        if cell.tiles != "chunks":
            patch.setattr(module, "alive", lambda *args: (None, None))
        for name in ours:
            jobs[name] = lower(name, problem, is_exact)
        patch.setattr(module, "alive", lambda *args: (None, None))
        for name in ADAPTERS if "tiled" in ours else ():
            try:
                jobs[name] = lower(name, problem, is_exact, stats=False)
            except NotImplementedError:
                continue
        jobs["exact"] = lower("exact", problem, x64=True)
        if not is_exact:
            jobs["reference"] = lower("reference", problem, x64=False)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        # Stored 16-bit projections are rounded. XLA would skip the rounding where it
        # can, and make the reference more exact than its dtypes.
        options = {"xla_allow_excess_precision": False}
        made = pool.map(lambda job: job.lowered.compile(options), jobs.values())
        made = dict(zip(jobs, made, strict=True))

    def results(name, args=None):
        return jobs[name].run(made[name], args)

    exact = results("exact")
    reference = exact if is_exact else results("reference")
    heads, lengths = grid.HEADS[cell.heads], grid.LENGTHS[cell.lengths]
    coarse = grid.DTYPES[cell.dtype]
    terms = sum(lengths) + heads.N + heads.H
    pairs = exact["lse"].size * problem.data["key"].shape[1]

    for name, settings in ours.items():
        for _ in settings():
            compare(results(name), reference, exact, coarse, terms, pairs)
    for name in ADAPTERS:
        if name not in jobs:
            continue
        # Adapters have no log-sum-exp: compare gradients with a zero cotangent for it.

        def silent(job):
            data, fixed, (d_output, d_lse) = job.args
            return data, fixed, (d_output, np.zeros_like(d_lse))

        exact = results("exact", silent(jobs["exact"]))
        if not is_exact:
            reference = results("reference", silent(jobs["reference"]))
        one, other = (dict(x, lse=None) for x in (reference, exact))
        compare(results(name), one, other, coarse, terms, pairs)


def test_every_pair_of_levels_occurs():
    covered = {pair for cell in CELLS for pair in grid.pairs_of(cell)}
    for (i, a), (j, b) in itertools.combinations(enumerate(grid.FACTORS.values()), 2):
        for one, other in itertools.product(a, b):
            assert ((i, one), (j, other)) in covered
    assert len(CELLS) < 200


def every(cell):
    """The implementations that support a cell, with the settings of each."""
    refused = load.why_not() or NATIVE_REFUSES & set(cell)
    native = {} if refused else {"native": instructions}
    # What a tile computes is the same for both; rows of many chunks differ.
    batched = {"batched": once} if cell.tiles == "chunks" else {}
    return {"tiled": once, **batched, **native}


#: Cells that tests/mutants names.
PLAIN = (
    "scaled_dot-not-bias_keys-grouped-float64-index-sinks-square-chunks",
    "bilinear-causal-bias_keys-grouped-float32-index-dropout-wide-whole",
    "scaled_dot-streaming-soft_cap-each-float32-offset-plain-square-chunks",
    "scaled_dot-none-none-grouped-float32-index-plain-wide-chunks",
    "cosine-causal-bias-grouped_square-float32-offset_batch-plain-wide-chunks",
)


@pytest.mark.parametrize("cell", grid.quick(CELLS, PLAIN), ids=str)
def test_cell(cell, tile, monkeypatch):
    conform(cell, tile, monkeypatch, every(cell))


@pytest.mark.slow
@pytest.mark.parametrize("cell", SAMPLES, ids=str)
def test_sample_of_the_whole_grid(cell, tile, monkeypatch):
    conform(cell, tile, monkeypatch, every(cell))
