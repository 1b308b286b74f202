"""No time without a right answer: every contender against the reference."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.bench.cases import Case, Spec, build
from attnlab._src.bench.contenders import (
    Prepared,
    attending,
    differentiated,
    named,
    widened,
)

#: Bytes that the reference may hold at a time.
HELD_BYTES = 2 << 30
#: What every pair together may hold where the timed programs themselves are checked.
DENSE_BYTES = HELD_BYTES // 2
#: Length at which contenders are checked where that is too much.
SHORT = 512


class Expected(NamedTuple):
    """What an array must be, and how far from it an entry may lie."""

    array: np.ndarray
    allowed: float


class Verdict(NamedTuple):
    """What the gate says of one contender.

    Attributes:
        passed: whether its times may be shown.
        error: greatest error over its allowance, over all arrays: at most 1 passes;
            None where nothing could be compared.
        reason: which array is wrong and by how much; empty if none.
    """

    passed: bool
    error: float | None
    reason: str = ""


def gate_case(
    case: Case, documents: Sequence[bytes], dense_bytes: int = DENSE_BYTES
) -> Case:
    """The case itself where the reference takes no longer, else a shorter one like it.

    Args:
        case: to be checked.
        documents: what it was made from.
        dense_bytes: as of ``Spec.dense_bytes``, up to which the timed programs
            themselves are checked; the reference never holds more than ``HELD_BYTES``.
    """
    if case.spec.dense_bytes <= dense_bytes or case.spec.length <= SHORT:
        return case
    return build(dataclasses.replace(case.spec, length=SHORT, batch=1), documents)


def expectations(case: Case, backward: bool = True) -> dict[str, Expected]:
    """Arrays by name, from the reference in the next wider type.

    The allowance is derived, not guessed: twice the error that the reference itself
    makes in the case's own type, and a rounding term: an eps of the type, and one of
    the accumulator for each of about sqrt(S) roundings that add up in a sum over S.

    Args:
        case: to be checked.
        backward: whether gradients are wanted, too.
    """
    with jax.enable_x64(case.spec.dtype == "float32"):
        truth = by_rows(widened(case), backward)
    own = by_rows(case, backward)
    result = {}
    for name, array in truth.items():
        error = float(np.abs(own[name] - array).max())
        # The floor keeps an array of zeros from allowing nothing at all.
        scale = max(float(np.abs(array).max()), float(np.finfo(np.float32).tiny))
        result[name] = Expected(array, 2 * error + rounding(case.spec) * scale)
    return result


def by_rows(case: Case, backward: bool) -> dict[str, np.ndarray]:
    """The reference's arrays, from as many queries at a time as fit in memory."""
    spec = case.spec
    # Twice: the case may be in float64.
    fitting = max(spec.queries * HELD_BYTES // (2 * spec.dense_bytes), 1)
    # A power of two divides most lengths: then all steps share one program.
    step = min(1 << (fitting.bit_length() - 1), spec.queries)
    run = attending("reference")
    run = jax.jit(differentiated(run) if backward else run)
    dense = case.dense_mask() if step < spec.queries else None
    parts = []
    for start in range(0, spec.queries, step):
        rows = slice(start, start + step)
        mask = case.mask if dense is None else dense[:, :, rows]
        arguments = (case.query[:, rows], case.key, case.value, case.score, mask)
        if backward:
            arguments += (case.cotangent[:, rows],)
        arrays = named(run(*arguments), backward)
        parts.append({n: np.asarray(a, np.float64) for n, a in arrays.items()})
    return {
        name: np.concatenate([p[name] for p in parts], 1)
        if name in {"output", "d_query"}
        else np.sum([p[name] for p in parts], 0)
        for name in parts[0]
    }


def rounding(spec: Spec) -> float:
    """Relative to the greatest entry: what another order of summation may change."""
    accumulated = math.sqrt(spec.length) * float(np.finfo(np.float32).eps)
    return 2 * float(jnp.finfo(spec.dtype).eps) + 4 * accumulated


def judge(results: dict[str, Any], expected: dict[str, Expected]) -> Verdict:
    """Compares every array that a contender returned with what it must be."""
    worst, reason = 0.0, ""
    for name, array in results.items():
        wanted = expected[name]
        found = np.asarray(array, np.float64)
        if found.shape != wanted.array.shape:
            shapes = f"{found.shape} instead of {wanted.array.shape}"
            return Verdict(False, None, f"{name} has shape {shapes}")
        error = float(np.abs(found - wanted.array).max())
        if not math.isfinite(error):
            return Verdict(False, None, f"{name} is not finite")
        ratio = error / wanted.allowed
        if ratio > worst:
            worst = ratio
            reason = f"{name} is off by {error:.2g}, allowed {wanted.allowed:.2g}"
    return Verdict(worst <= 1, worst, "" if worst <= 1 else reason)


def check(prepared: Sequence[Prepared], expected: dict[str, Expected]) -> Verdict:
    """Runs each once; the first verdict that does not pass, else the worst.

    Who returns anything returns everything; yardsticks return nothing.
    """
    worst, returned = Verdict(True, 0.0), set[str]()
    for ready in prepared:
        results = ready.results(jax.block_until_ready(ready.call()))
        returned |= results.keys()
        verdict = judge(results, expected)
        if not verdict.passed:
            return verdict
        worst = max(worst, verdict, key=lambda v: v.error or 0.0)
    missing = sorted(expected.keys() - returned) if returned else []
    if missing:
        return Verdict(False, None, f"{', '.join(missing)} missing")
    return worst
