"""The gate: right results pass in every dtype, wrong ones are not timed."""

import dataclasses

import pytest

from attnlab._src.bench import gate
from attnlab._src.bench.cases import PATTERNS, SCORES, build
from attnlab._src.bench.contenders import Implementation
from attnlab._src.bench.peers import installed_peers
from attnlab._src.bench.runner import Group, run
from attnlab._src.bench.timing import Repeats
from tests.bench.conftest import SMALL, WRONG, Wrong
from tests.grid import few

ONCE = Repeats(1, 1)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_contender_gets_no_time(documents, change):
    group = Group(SMALL, (Wrong(change), Implementation("reference")))
    ((wrong, right),) = run([group], documents, ONCE)
    assert (wrong.status, right.status) == ("failed", "ok")
    assert wrong.forward is None
    assert wrong.both is None
    assert wrong.reason.startswith(("output ", "d_key "))
    assert right.both is not None
    assert right.both.timing.repeats == 1


def test_who_leaves_a_gradient_out_does_not_pass(documents, monkeypatch):
    def without(arrays):
        return {n: x for n, x in arrays.items() if n != "d_key"}

    group = Group(SMALL, (Wrong(without),))
    ((wrong,),) = run([group], documents, ONCE)
    assert (wrong.status, wrong.reason) == ("failed", "d_key missing")


def test_contender_that_breaks_does_not_stop_the_others(documents):
    def broken(arrays):
        raise RuntimeError("out of order\nand more")

    group = Group(SMALL, (Wrong(broken), Implementation("reference")))
    ((wrong, right),) = run([group], documents, ONCE)
    assert (wrong.status, right.status) == ("failed", "ok")
    assert wrong.reason == "RuntimeError: out of order"


@pytest.mark.parametrize("dtype", few(["float32", "bfloat16"], "bfloat16"))
def test_peers_and_tiled_pass(documents, dtype):
    spec = dataclasses.replace(SMALL, dtype=dtype, pattern="window", length=300)
    group = Group(spec, (Implementation("tiled"), *installed_peers()))
    (rows,) = run([group], documents, ONCE)
    assert {row.contender: (row.status, row.reason) for row in rows} == {
        row.contender: ("ok", "") for row in rows
    }


def test_refusal_is_no_failure(documents):
    spec = dataclasses.replace(SMALL, score="additive")
    ((row,),) = run([Group(spec, (Implementation("jax_nn"),))], documents, ONCE)
    assert (row.status, row.forward) == ("refused", None)
    assert row.reason.startswith("the score is not an inner product")


def test_skipped_where_no_time_is_left(documents):
    groups = [Group(SMALL, (Implementation("reference"),))]
    ((row,),) = run(groups, documents, ONCE, budget=0)
    assert (row.status, row.forward) == ("skipped", None)


def test_long_cases_are_checked_shorter(documents):
    spec = dataclasses.replace(SMALL, length=40_000, pattern="window", head_size=2)
    case = build(dataclasses.replace(spec, length=64), documents)
    long = dataclasses.replace(case, spec=spec)
    assert gate.gate_case(long, documents).spec.length == gate.SHORT
    assert gate.gate_case(case, documents) is case


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_cell_can_be_built(documents, pattern, score):
    spec = dataclasses.replace(SMALL, pattern=pattern, score=score)
    case = build(spec, documents)
    assert case.query.shape == (2, 37, 3, 5)
    assert 0 < case.density <= 1
    # The backward pass of an inner product takes 2.5 times the FLOPs of the forward
    # pass, in addition to it.
    if score == "scaled_dot":
        assert case.useful_flops(True) == pytest.approx(3.5 * case.useful_flops(False))
    assert (case.tanh_count(False) > 0) == (score in {"additive", "concat"})
