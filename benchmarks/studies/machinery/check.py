"""Compares the numbers of a new run with the committed ones."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import Json, read_json

#: Relative tolerance. Other machines sum in another order, and training amplifies the
#: difference. Quick runs learn little, so a fault may change a loss by little more.
TOLERANCE = 0.001
#: Absolute tolerance, for shares and for numbers close to zero.
ABSOLUTE = 0.001
#: Results that are times, depend on times, or come from the compiler.
TIMES = frozenset({
    "compile_seconds",
    "crossover",
    "fit",
    "milliseconds_per_step",
    "minutes",
    "quantiles",
    "seconds",
    "seconds_per_step",
    "speed_against_full",
    "temporary_bytes",
    "tile_rates",
    "tokens_per_second",
    "tpu",
})


def committed(path: Path) -> Json:
    """The results of a quick form, from its JSON file.

    Raises:
        StudyError: if there is no such file.
    """
    found = read_json(path)
    if found is None:
        raise StudyError(f"--check: there is no {path} to compare with")
    return found


def differences(old: Json, new: Json) -> list[str]:
    """A line for each number that differs, times excepted.

    Args:
        old: the committed JSON of a study.
        new: the JSON of a new run.
    """
    before, after = numbers(old), numbers(json.loads(json.dumps(new)))
    lines = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, math.nan), after.get(name, math.nan)
        if not math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=ABSOLUTE):
            lines.append(f"{name}: was {was:g}, is {now:g}")
    return lines


def numbers(content: Json) -> dict[str, float]:
    """All numbers of a study's JSON except times, by name."""
    parts = ("runs", "results")
    return {n: v for part in parts for n, v in _numbers(part, content[part])}


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in TIMES:
                yield from _numbers(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _numbers(f"{name}[{i}]", inner)
    elif isinstance(value, (int, float)):
        yield name, float(value)
