"""Reports of a run: a table for the terminal, and JSON."""

import dataclasses
import datetime as dt
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from attnlab._src.bench.cases import PATTERN_NOTES
from attnlab._src.bench.machine import (
    Peaks,
    machine_line,
    peak_resident_memory,
    versions,
)
from attnlab._src.bench.runner import Pass, Row
from attnlab._src.files import write_atomically

FORMAT = 1


def shares(measured: Pass, dtype: str, peaks: Peaks) -> dict[str, float | None]:
    """Measured performance as shares of the machine's peaks.

    ``of_matmul_peak`` is useful operations per second over the peak of matrix products
    in that dtype. ``of_tanh_bound`` is a lower bound of the time over the measured
    time; the bound counts evaluations of tanh at their peak rate and the other
    operations at that of matrix products (None if the score has no tanh).
    """
    seconds, flops = measured.timing.median, peaks.matmul[dtype]
    least = measured.tanh_count / peaks.tanh + measured.beside_tanh_flops / flops
    return {
        "of_matmul_peak": measured.useful_flops / seconds / flops,
        "of_tanh_bound": least / seconds if measured.tanh_count else None,
    }


def as_record(row: Row, peaks: Peaks) -> dict[str, Any]:
    """A row as a record for JSON."""
    record: dict[str, Any] = dataclasses.asdict(row)
    for direction, measured in (("forward", row.forward), ("both", row.both)):
        if measured is not None:
            record[direction] = {
                **dataclasses.asdict(measured),
                "timing": measured.timing._asdict(),
                **shares(measured, row.spec.dtype, peaks),
            }
    return record


def document(
    rows: Sequence[Row], peaks: Peaks, arguments: Sequence[str], *, complete: bool
) -> dict[str, Any]:
    """All data of a run, ready for JSON.

    Args:
        rows: what was measured.
        peaks: peak rates of the machine.
        arguments: the command line, program first.
        complete: False if the run was interrupted.
    """
    return {
        "format": FORMAT,
        "command": shlex.join(arguments),
        "machine": machine_line(),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "complete": complete,
        "peaks": peaks._asdict(),
        "peak_resident_bytes": peak_resident_memory(),
        "units": "seconds, bytes, operations; of_*: share of the peak",
        "rows": [as_record(row, peaks) for row in rows],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a document atomically."""
    text = json.dumps(content, indent=1, allow_nan=False, default=str)
    write_atomically(path, (text + "\n").encode())


def milliseconds(measured: Pass) -> str:
    """Median and the 20 % and 80 % quantiles in milliseconds, as text."""
    median, low, high, _ = (1e3 * x for x in measured.timing)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f} [dim]{low:,.{digits}f}-{high:,.{digits}f}[/]"


def _share(measured: Pass, dtype: str, peaks: Peaks) -> str:
    found = shares(measured, dtype, peaks)
    if found["of_tanh_bound"] is not None:
        return f"{found['of_tanh_bound']:.0%} tanh"
    return f"{found['of_matmul_peak']:.0%}"


def _both(
    forward: float | None, both: float | None, *, digits: int = 1, scale: float = 1
) -> str:
    return " / ".join(
        "-" if x is None else f"{x * scale:,.{digits}f}" for x in (forward, both)
    )


def _cells(row: Row, peaks: Peaks) -> list[str]:
    forward, both = row.forward, row.both
    if forward is None or both is None:
        return []

    rates = [x.useful_flops / x.timing.median / 1e9 for x in (forward, both)]
    return [
        milliseconds(forward),
        milliseconds(both),
        _both(rates[0], rates[1], digits=0),
        " / ".join(_share(x, row.spec.dtype, peaks) for x in (forward, both)),
        _both(forward.temporary_bytes, both.temporary_bytes, scale=1e-6),
        _both(forward.compile_seconds, both.compile_seconds),
    ]


def table(rows: Sequence[Row], peaks: Peaks, title: str) -> Table:
    """The rows as a table, a section for each problem; times only if checks passed."""
    made = Table(title=title, title_justify="left", pad_edge=False)
    dtypes = {row.spec.dtype for row in rows}
    for name in ("pattern · score", "runs on"):
        made.add_column(name, no_wrap=True)
    for name in (
        "forward ms\n[dim]20-80 %[/]",
        "fwd+bwd ms\n[dim]20-80 %[/]",
        "useful\nGFLOP/s",
        "of peak",
        "temp. MB",
        "compile s",
    ):
        made.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        first = ""
        if row.spec != previous:
            if previous is not None:
                made.add_section()
            first = row.spec.label
            if len(dtypes) > 1:
                first += f" {row.spec.dtype}"
            previous = row.spec
        if row.status == "ok":
            made.add_row(first, row.contender, *_cells(row, peaks))
        else:
            style = {"failed": "bold red"}.get(row.status, "dim")
            word = "FAILED" if row.status == "failed" else row.status
            made.add_row(first, row.contender, f"[{style}]{word}[/]")
    return made


def notes(rows: Sequence[Row], peaks: Peaks) -> list[str]:
    """Lines to print below the table: reasons, sizes, patterns, peaks."""
    lines = []
    for status in ("failed", "refused", "skipped"):
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.status == status:
                who = f"{row.contender} ({row.spec.label})"
                reasons.setdefault(row.reason, []).append(who)
        word = "FAILED" if status == "failed" else status
        lines += [f"{word}: {', '.join(who)}: {r}" for r, who in reasons.items()]
    sizes: dict[str, list[str]] = {}
    for row in rows:
        s = row.spec
        text = (
            f"B={s.batch} T={s.queries} S={s.length} N={s.heads} K={s.key_heads} "
            f"H=D={s.head_size}"
        )
        scores = sizes.setdefault(text, [])
        if s.score not in scores:
            scores.append(s.score)
    lines += [f"{text}: {', '.join(scores)}" for text, scores in sizes.items()]
    seen = dict.fromkeys(row.spec.pattern for row in rows)
    densities = {r.spec.pattern: r.density for r in rows if r.density is not None}
    patterns = []
    for name in seen:
        known = [PATTERN_NOTES[name]] if name in PATTERN_NOTES else []
        if name in densities:
            known.append(f"{densities[name]:.1%} visible")
        patterns.append(f"{name} ({', '.join(known)})")
    lines.append(f"patterns: {'; '.join(patterns)}")
    rates = ", ".join(f"{v / 1e9:,.0f} GFLOP/s {k}" for k, v in peaks.matmul.items())
    resident = peak_resident_memory()
    lines.append(
        f"peaks here: matrix product {rates}; tanh {peaks.tanh / 1e9:.2f} G/s"
        + (f"; this process held up to {resident / 1e9:.1f} GB" if resident else "")
    )
    found = [
        share
        for row in rows
        for measured in (row.forward, row.both)
        if measured is not None
        for share in shares(measured, row.spec.dtype, peaks).values()
    ]
    if any(share is not None and share > 1 for share in found):
        lines.append(
            "above 100 %: the machine was busier while its peaks were measured"
        )
    return lines
