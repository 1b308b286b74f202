"""Files of measurements, read back: of ``attnlab bench``, of scripts, of studies."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: What every file of attnlab's commands has.
_KNOWN_BY = ("machine", "versions", "date")
#: What rows of ``attnlab bench`` have.
_OF_ROWS = {"spec", "contender", "status", "forward", "both"}
#: What rows of ``attnlab static`` have; those of GPUs have kernels besides.
_OF_STATIC = {"spec", "target", "of", "why"}
#: Contenders that are attnlab's own, best first.
OURS = ("native", "batched", "tiled", "pallas_tpu", "pallas_gpu")
#: What reads keys and values and computes nothing: a bound, no contender.
BOUNDS = ("read",)
#: Rows of a table that is made of a file of unknown layout.
_MOST_ROWS = 500


class Line(NamedTuple):
    """A contender's result on one problem.

    Attributes:
        problem: pattern, score, and what else tells the problems of the file apart.
        spec: all of the problem, as JSON, by which runs are compared.
        direction: ``"forward"`` or ``"both"`` (forward and backward).
        contender: who ran.
        status: ``"ok"``, or why there is no time: ``"failed"``, ``"refused"``, ...
        reason: the status in a sentence.
        length: S.
        density: visible pairs over all pairs; None: not known.
        median: seconds; None without a time.
        low: 20 % quantile, seconds.
        high: 80 % quantile, seconds.
        error: greatest error over the allowed one, both passes; None: not checked.
        memory: peak bytes beside inputs and outputs; None: not known.
    """

    problem: str
    spec: str
    direction: str
    contender: str
    status: str
    reason: str
    length: int
    density: float | None
    median: float | None
    low: float | None
    high: float | None
    error: float | None
    memory: int | None


class Estimate(NamedTuple):
    """What a compiler says of a pass on a TPU or GPU (``attnlab static``).

    Attributes:
        problem: target, pass, mask, and what else tells the problems of the file apart.
        cycles: of the whole pass, on one core; None: the compiler tells none.
        least: the highest lower bound, in cycles; None: not known.
        binds: what that bound is of.
        cells: all else: names and values.
    """

    problem: str
    cycles: float | None
    least: float | None
    binds: str
    cells: dict[str, Any]


#: A title, the columns, and the cells of each row.
_Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


class Run(NamedTuple):
    """What a file says.

    Attributes:
        name: of the file.
        facts: machine, versions, date, command, ...: names and texts.
        lines: measurements of contenders; empty where the file has none.
        estimates: of ``attnlab static``; empty in other files.
        tables: all else: title, columns, and the cells of each row.
    """

    name: str
    facts: list[tuple[str, str]]
    lines: list[Line]
    estimates: list[Estimate]
    tables: list[_Table]


def read_run(path: Path) -> Run:
    """Reads a file that attnlab's commands, scripts or studies wrote.

    Raises:
        ValueError: if it cannot be read, is no JSON, or is not one of these files.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: is no complete JSON: {error}") from None
    if not isinstance(content, dict) or not all(n in content for n in _KNOWN_BY):
        raise ValueError(
            f"{path}: expected a file of attnlab bench or static, of a script in "
            f"benchmarks or of a study; such files have {', '.join(_KNOWN_BY)}"
        )
    try:
        lines, estimates = [*_lines(content)], [*_estimates(content)]
        tables = [*_kernels(content)] if estimates else [*_other(content, bool(lines))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: its rows are not those of this version: {error!r}"
        ) from None
    return Run(path.name, [*_facts(content)], lines, estimates, tables)


def _facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("title", "claim", "answer", "command", "machine", "date"):
        if isinstance(content.get(name), str):
            yield name, content[name]
    versions = content["versions"]
    if isinstance(versions, Mapping):
        yield "versions", ", ".join(f"{k} {v}" for k, v in versions.items())
    if content.get("complete") is False:
        yield "complete", "no: the run was interrupted"
    if content.get("quick"):
        yield "quick", "yes: small problems, few repeats"


def _lines(content: Mapping[str, Any]) -> Iterator[Line]:
    if "lines" in content:  # of benchmarks.peers
        for each in content["lines"]:
            for row in each.get("rows", ()):
                yield _line(each["name"], each["direction"], each["spec"], row, row)
        return
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(row.keys() >= _OF_ROWS for row in rows):
        return
    for row, problem in zip(rows, _problems(rows), strict=True):
        for direction in ("forward", "both"):
            yield _line(problem, direction, row["spec"], row, row[direction] or {})


def _problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pattern and score of each row, and the sizes in which rows differ."""
    specs = [row["spec"] for row in rows]
    differing = [
        name
        for name in ("dtype", "length", "query_length", "heads", "key_heads")
        if len({spec.get(name) for spec in specs}) > 1
    ]
    return [
        ", ".join([
            f"{spec['pattern']} · {spec['score']}",
            *(f"{n} {spec[n]}" for n in differing if spec.get(n) is not None),
        ])
        for spec in specs
    ]


def _estimates(content: Mapping[str, Any]) -> Iterator[Estimate]:
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(row.keys() >= _OF_STATIC for row in rows):
        return
    for row, problem in zip(rows, _problems(rows), strict=True):
        target, of = row["target"], row["of"]
        bounds, told = row.get("bounds") or {}, row.get("kernel") or {}
        shown = {
            "blocks": "x".join(map(str, (row.get("blocks") or {}).values())) or None,
            "full": row.get("full"),
            "partial": row.get("partial"),
            "of all": row.get("total"),
            "spills": told.get("spills"),
            "vector memory": told.get("memory"),
            "times splash": row.get("ratio_to_splash"),
            "why": row.get("why"),
        }
        yield Estimate(
            f"{target}, {of}, {problem}",
            row.get("cycles"),
            max(bounds.values(), default=None),
            row.get("binds") or "",
            shown,
        )


def _kernels(content: Mapping[str, Any]) -> Iterator[_Table]:
    """The kernels of rows that are of GPUs."""
    rows = [
        {"problem": f"{row['target']}, {row['of']}, {problem}", **flat(kernel)}
        for row, problem in zip(
            content["rows"], _problems(content["rows"]), strict=True
        )
        for kernel in row.get("kernels", ())
    ]
    if rows:
        yield _joined("Kernels", rows)


def _line(
    problem: str,
    direction: str,
    spec: Mapping[str, Any],
    row: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Line:
    timing = measured.get("timing") if row["status"] == "ok" else None
    timing = timing or {}
    for name in ("median", "low", "high"):
        if not isinstance(timing.get(name), (int, float, type(None))):
            raise TypeError(f"{name}: expected seconds, got {timing[name]!r}")
    return Line(
        problem,
        json.dumps(spec, sort_keys=True),
        direction,
        row["contender"],
        row["status"],
        row.get("reason") or "",
        spec["length"],
        row.get("density"),
        timing.get("median"),
        timing.get("low"),
        timing.get("high"),
        row.get("error"),
        measured.get("temporary_bytes"),
    )


def _other(content: Mapping[str, Any], timed: bool) -> Iterator[_Table]:
    """The tables of a file beside its measurements."""
    if timed:
        rows = [
            [line["name"], name, value, line.get("unit")]
            for line in content.get("lines", ())
            for name, value in line.get("values", {}).items()
        ]
        if rows:
            yield "Overheads", ["name", "contender", "value", "unit"], rows
        return
    for made in content.get("tables", ()):  # of a study
        if not all(isinstance(row, list) for row in made["rows"]):
            raise TypeError("rows: expected lists of cells")
        yield made["caption"], made["header"], made["rows"]
    left_out = {*_KNOWN_BY, "tables", "peaks"}
    for name, value in content.items():
        if name not in left_out:
            yield from _tables(value, (str(name),))


def _tables(content: Any, path: tuple[str, ...]) -> Iterator[_Table]:
    """Records as rows of a table, wherever several are alike."""
    title = ".".join(path)
    if isinstance(content, list):
        rows = [flat(x) for x in content[:_MOST_ROWS] if isinstance(x, Mapping)]
        if rows and len(rows) == len(content[:_MOST_ROWS]):
            if len(content) > _MOST_ROWS:
                title += f" (the first {_MOST_ROWS} of {len(content):,})"
            yield _joined(title, rows)
    elif isinstance(content, Mapping):
        values = [*content.values()]
        if values and all(_is_record(x) for x in values):
            yield _joined(title, [{"name": n, **flat(x)} for n, x in content.items()])
            return
        single = [
            [name, value]
            for name, value in content.items()
            if not isinstance(value, (Mapping, list))
        ]
        if single:
            yield title, ["name", "value"], single
        for name, value in content.items():
            yield from _tables(value, (*path, str(name)))


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(
        isinstance(x, (Mapping, list)) for x in value.values()
    )


def _joined(title: str, rows: Sequence[Mapping[str, Any]]) -> _Table:
    columns = [*dict.fromkeys(name for row in rows for name in row)]
    return title, columns, [[row.get(name) for name in columns] for row in rows]


def flat(record: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """A record without nesting: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping):
            found |= flat(value, inner)
        elif isinstance(value, list):
            found[inner] = ", ".join(map(str, value))
        else:
            found[inner] = value
    return found


class Difference(NamedTuple):
    """The same contender on the same problem in two runs.

    Attributes:
        before: of the first run.
        after: of the second run.
        seconds: medians of both.
        ratio: time after over time before.
        verdict: ``"slower"`` or ``"faster"`` if the intervals from the 20 % to the 80 %
            quantile are apart by more than 3 %; else ``"same"``.
    """

    before: Line
    after: Line
    seconds: tuple[float, float]
    ratio: float
    verdict: str


def differences(before: Sequence[Line], after: Sequence[Line]) -> list[Difference]:
    """What both runs timed, the greatest slow-down first."""
    key = lambda line: (line.spec, line.direction, line.contender)
    known = {key(line): line for line in before if line.median is not None}
    found = []
    for line in after:
        old = known.get(key(line))
        if old is None or not (old.median and old.low and old.high):
            continue
        if not (line.median and line.low and line.high):
            continue
        verdict = "same"
        if line.low > 1.03 * old.high:
            verdict = "slower"
        elif line.high < old.low / 1.03:
            verdict = "faster"
        seconds = old.median, line.median
        found.append(Difference(old, line, seconds, seconds[1] / seconds[0], verdict))
    return sorted(found, key=lambda each: -each.ratio)
