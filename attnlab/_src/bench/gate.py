"""Checks every contender against the reference before it is timed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
from attnlab._src.types import ArrayLike

#: Greatest memory of the reference, in bytes.
HELD_BYTES = 2 << 30
#: Greatest ``Spec.dense_bytes`` up to which a case is checked at its own length.
DENSE_BYTES = HELD_BYTES // 2
#: Length at which contenders are checked for larger cases.
SHORT = 512


class Expected(NamedTuple):
    """The expected array, and the greatest error that an entry may have."""

    array: np.ndarray
    allowed: float


class Verdict(NamedTuple):
    """Result of the check of one contender.

    Attributes:
        passed: whether it passed.
        error: greatest quotient of error and allowed error, over all arrays; at most 1
            passes; None if nothing could be compared.
        reason: which array is wrong and by how much; empty if it passed.
    """

    passed: bool
    error: float | None
    reason: str = ""


def gate_case(
    case: Case, documents: Sequence[bytes], dense_bytes: int = DENSE_BYTES
) -> Case:
    """The case to check: the case itself, or a shorter one if it is too large.

    Args:
        case: the case that is timed.
        documents: the documents that it was made from.
        dense_bytes: greatest ``Spec.dense_bytes`` of a case that is checked itself; the
            reference uses at most ``HELD_BYTES`` in either case.
    """
    if case.spec.dense_bytes <= dense_bytes or case.spec.length <= SHORT:
        return case
    return build(dataclasses.replace(case.spec, length=SHORT, batch=1), documents)


def expectations(case: Case, backward: bool = True) -> dict[str, Expected]:
    """Expected arrays by name, from the reference in a wider type.

    The allowed error is twice the error of the reference in the case's own type, plus a
    rounding term: the eps of the type, and that of the accumulator times sqrt(S), to
    which the rounding errors of a sum over S add up.

    Args:
        case: the case to check.
        backward: whether gradients are expected, too.
    """
    with jax.enable_x64(case.spec.dtype == "float32"):
        truth = by_rows(widened(case), backward)
    own = by_rows(case, backward)
    result = {}
    for name, array in truth.items():
        error = float(np.abs(own[name] - array).max())
        # Not 0 for an array of zeros.
        scale = max(float(np.abs(array).max()), float(np.finfo(np.float32).tiny))
        result[name] = Expected(array, 2 * error + rounding(case.spec) * scale)
    return result


def by_rows(case: Case, backward: bool) -> dict[str, np.ndarray]:
    """The reference's arrays, computed in chunks of queries that fit in memory."""
    spec = case.spec
    # Factor 2: the case may be in float64.
    fitting = max(spec.queries * HELD_BYTES // (2 * spec.dense_bytes), 1)
    # A power of two divides most lengths; then all chunks use one compiled program.
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
    """Error of another order of summation, relative to the greatest entry."""
    accumulated = math.sqrt(spec.length) * float(np.finfo(np.float32).eps)
    return 2 * float(jnp.finfo(spec.dtype).eps) + 4 * accumulated


def judge(results: Mapping[str, ArrayLike], expected: dict[str, Expected]) -> Verdict:
    """Compares every array that a contender returned with the expected one."""
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
    """Runs each computation once and checks its arrays.

    A contender must return all expected arrays, or none (yardsticks).

    Returns:
        The first verdict that does not pass, else that with the greatest error.
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
