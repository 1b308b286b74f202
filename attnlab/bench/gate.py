"""No time without a right answer: every contender against the reference."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.bench.cases import Case, Spec, build
from attnlab.bench.contenders import Implementation, Prepared, widened

#: Bytes that the reference may hold where the timed programs themselves are checked.
FULL_SIZE_BYTES = 2 << 30
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


def gate_case(case: Case, documents: Sequence[bytes]) -> Case:
    """The case itself where the reference fits, else a shorter one like it."""
    # The reference runs once in the next wider type.
    fits = 2 * case.spec.dense_bytes <= FULL_SIZE_BYTES
    if fits or case.spec.length <= SHORT:
        return case
    return build(dataclasses.replace(case.spec, length=SHORT, batch=1), documents)


def expectations(case: Case) -> dict[str, Expected]:
    """Arrays by name, from the reference in the next wider type.

    The allowance is derived, not guessed: twice the error that the reference itself
    makes in the case's own type, and a rounding term: an eps of the type, and one of
    the accumulator for each of about sqrt(S) roundings that add up in a sum over S.
    """
    reference = Implementation("reference")

    def run(case: Case) -> dict[str, np.ndarray]:
        prepared = reference.prepare(case, backward=True)
        arrays = prepared.results(jax.block_until_ready(prepared.call()))
        return {name: np.asarray(a, np.float64) for name, a in arrays.items()}

    with jax.enable_x64(case.spec.dtype == "float32"):
        truth = run(widened(case))
    own = run(case)
    result = {}
    for name, array in truth.items():
        error = float(np.abs(own[name] - array).max())
        # The floor keeps an array of zeros from allowing nothing at all.
        scale = max(float(np.abs(array).max()), float(np.finfo(np.float32).tiny))
        result[name] = Expected(array, 2 * error + rounding(case.spec) * scale)
    return result


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
    """Runs each once; the first verdict that does not pass, else the worst."""
    worst = Verdict(True, 0.0)
    for ready in prepared:
        verdict = judge(ready.results(jax.block_until_ready(ready.call())), expected)
        if not verdict.passed:
            return verdict
        worst = max(worst, verdict, key=lambda v: v.error or 0.0)
    return worst
