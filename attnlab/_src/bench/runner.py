"""Checks and times groups of contenders, one group after another."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from attnlab._src.bench.cases import Case, Spec, build
from attnlab._src.bench.contenders import Contender, Prepared
from attnlab._src.bench.gate import (
    DENSE_BYTES,
    Verdict,
    check,
    expectations,
    gate_case,
)
from attnlab._src.bench.pace import Pace
from attnlab._src.bench.timing import Repeats, Timing, interleave

DIRECTIONS = ("forward", "both")


class Group(NamedTuple):
    """A problem and the contenders that are compared on it.

    Attributes:
        spec: the problem.
        contenders: contenders that are always measured, if there is time for the group.
        beside: dense implementations and peers, skipped if time is short.
        directions: what is timed: "forward", "both" (forward and backward together).
    """

    spec: Spec
    contenders: tuple[Contender, ...]
    beside: tuple[Contender, ...] = ()
    directions: tuple[str, ...] = DIRECTIONS


@dataclasses.dataclass(frozen=True)
class Pass:
    """Results of one direction; times in seconds.

    Attributes:
        timing: time of a call, without compilation.
        compile_seconds: time of compilation; None if nothing is compiled ahead of time.
        temporary_bytes: peak memory besides inputs and outputs; None if unknown.
        useful_flops: operations on visible pairs.
        tanh_count: see ``Case.tanh_count``; 0 for scores without tanh.
        beside_tanh_flops: see ``Case.beside_tanh_flops``.
    """

    timing: Timing
    compile_seconds: float | None
    temporary_bytes: int | None
    useful_flops: float
    tanh_count: float
    beside_tanh_flops: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one contender on one problem.

    Attributes:
        spec: the problem.
        contender: name of the contender.
        status: "ok", "failed", "refused" or "skipped"; only "ok" has times.
        reason: reason of another status than "ok"; else empty.
        density: number of visible pairs over that of all pairs.
        error: greatest quotient of error and allowed error; None if nothing was
            compared.
        forward: forward pass; None unless "ok" and asked for.
        both: forward and backward together; None unless "ok" and asked for.
    """

    spec: Spec
    contender: str
    status: str
    reason: str = ""
    density: float | None = None
    error: float | None = None
    forward: Pass | None = None
    both: Pass | None = None


def run(
    groups: Sequence[Group],
    documents: Sequence[bytes],
    repeats: Repeats,
    *,
    budget: float | None = None,
    checked_bytes: int = DENSE_BYTES,
    report: Callable[[str], None] = lambda doing: None,
) -> Iterator[list[Row]]:
    """Measures groups and yields the rows of each.

    Args:
        groups: groups to measure.
        documents: the text.
        repeats: how often calls are repeated.
        budget: seconds; what would exceed them is skipped. None: no limit.
        checked_bytes: see :func:`attnlab._src.bench.gate.gate_case`.
        report: called with a description of each step.
    """
    pace = Pace(budget, repeats, len(groups))
    for group in groups:
        spec, own, beside, _ = group
        start = time.perf_counter()
        contenders, skipped = own + beside, ()
        if not pace.allows():
            contenders, skipped = (), contenders
        elif not pace.allows_beside(len(beside)):
            contenders, skipped = own, beside
        rows = []
        if contenders:
            report(f"{spec.label}: reference")
            case = build(spec, documents)
            checked = gate_case(case, documents, checked_bytes)
            rows, prepared = prepare_checked(
                case, checked, contenders, group.directions, report
            )
            report(f"{spec.label}: timing")
            passes = time_passes(case, prepared, pace.repeats())
            rows = [
                replace(
                    row,
                    forward=passes.get((row.contender, "forward")),
                    both=passes.get((row.contender, "both")),
                )
                for row in rows
            ]
        why = "no time left; --full has no limit"
        rows += [Row(spec, c.name, "skipped", why) for c in skipped]
        pace.record(time.perf_counter() - start, len(contenders) - len(own))
        yield rows


def prepare_checked(
    case: Case,
    checked: Case,
    contenders: Sequence[Contender],
    directions: Sequence[str],
    report: Callable[[str], None],
) -> tuple[list[Row], dict[tuple[str, str], Prepared]]:
    """Compiles and checks all contenders.

    Returns:
        A row for each, without times; and the computations of those with status "ok",
        by name and direction.
    """
    rows: list[Row] = []
    prepared: dict[tuple[str, str], Prepared] = {}
    backward = "both" in directions
    expected = None
    for contender in contenders:
        name = contender.name
        row = Row(case.spec, name, "ok", density=case.density)
        refusal = contender.refusal(case)
        if refusal:
            rows.append(replace(row, status="refused", reason=refusal))
            continue
        if expected is None:
            expected = expectations(checked, backward)
        report(f"{case.spec.label}: {name}")
        try:
            ready = {
                (name, way): contender.prepare(case, way == "both")
                for way in directions
            }
            judged = list(ready.values())
            if checked is not case:
                judged = [contender.prepare(checked, backward)]
            verdict = check(judged, expected)
            status = "ok" if verdict.passed else "failed"
        except NotImplementedError as error:
            ready, status = {}, "refused"
            verdict = Verdict(False, None, str(error))
        # Any error counts as a failed check; other contenders still run.
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            ready, status = {}, "failed"
            verdict = Verdict(False, None, f"{type(error).__name__}: {said[0]}")
        rows.append(
            replace(row, status=status, reason=verdict.reason, error=verdict.error)
        )
        if status == "ok":
            prepared |= ready
    return rows, prepared


def time_passes(
    case: Case, prepared: dict[tuple[str, str], Prepared], repeats: Repeats
) -> dict[tuple[str, str], Pass]:
    """Times all prepared calls, interleaved; returns passes by name and direction."""
    timings = interleave({key: p.call for key, p in prepared.items()}, repeats)
    return {
        (name, direction): Pass(
            timing,
            prepared[name, direction].compile_seconds,
            prepared[name, direction].temporary_bytes,
            case.useful_flops(direction == "both"),
            case.tanh_count(direction == "both"),
            case.beside_tanh_flops(direction == "both"),
        )
        for (name, direction), timing in timings.items()
    }
