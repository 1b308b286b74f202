"""Are the committed numbers those that this machine finds?"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import Json, read_json

#: Relative: sums come in another order on another machine, and training carries that
#: on. Quick runs learn little: what is wrong may move a loss no more than this.
TOLERANCE = 0.001
#: Numbers that are close to zero, and shares, may be off by so much.
ABSOLUTE = 0.001
#: Parts of the results that are times, follow from them, or are the compiler's.
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
    """The results of a quick form that are to be found again.

    Raises:
        StudyError: if there are none.
    """
    found = read_json(path)
    if found is None:
        raise StudyError(f"--check: there is no {path} to compare with")
    return found


def differences(old: Json, new: Json) -> list[str]:
    """What is not the same, a line each: all numbers but times.

    Args:
        old: a study's JSON, committed.
        new: the same, made anew.
    """
    before, after = numbers(old), numbers(json.loads(json.dumps(new)))
    lines = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, math.nan), after.get(name, math.nan)
        if not math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=ABSOLUTE):
            lines.append(f"{name}: was {was:g}, is {now:g}")
    return lines


def numbers(content: Json) -> dict[str, float]:
    """What a study's JSON holds but times, by name."""
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
