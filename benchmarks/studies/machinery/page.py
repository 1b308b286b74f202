"""The page of a study: a Markdown file, a JSON file and charts as SVG."""

import dataclasses
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from attnlab._src.bench.charts import save
from attnlab._src.files import write_atomically
from benchmarks.common import lines as lines
from benchmarks.common import side_by_side
from benchmarks.studies.machinery.record import Json, as_json
from benchmarks.studies.machinery.training import surroundings


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, with columns of numbers aligned to the right.

    Args:
        header: names of the columns.
        rows: the cells of each row, one for each column.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"rows: expected {len(header)} cells in each")
    numeric = [
        all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]
    lines = [header, ["--:" if n else "---" for n in numeric], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


@dataclasses.dataclass(frozen=True)
class Page:
    """The result of a study.

    Attributes:
        template: a Markdown file with a ``{name}``, or ``{name:.3f}``, for each of
            ``values``, and an image ``NAME-CHART.svg`` for each of ``charts``.
        values: numbers, names and tables, by their name in the template.
        charts: Matplotlib figures by name, for instance from :func:`lines`.
        results: all numbers, for the JSON file.
    """

    template: Path
    values: Mapping[str, object]
    charts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    results: Json = dataclasses.field(default_factory=dict)


def cost_of(summaries: Iterable[Json]) -> str:
    """A sentence: number, sizes, tokens, time, machines and dates of training runs."""
    runs = list(summaries)
    sizes = sorted({run["parameters"] for run in runs})
    parameters = " to ".join(f"{n:,}" for n in dict.fromkeys([sizes[0], sizes[-1]]))
    minutes = sum(run["seconds"] for run in runs) / 60
    tokens = sum(run["tokens"] for run in runs)
    machines = "; ".join(dict.fromkeys(run["machine"] for run in runs))
    dates = [run["date"][:10] for run in runs]
    days = " to ".join(dict.fromkeys([min(dates), max(dates)]))
    return (
        f"Training runs: {len(runs)}; parameters of each: {parameters}; target tokens: "
        f"{tokens:,}; minutes: {minutes:,.1f} ({machines}, {days})."
    )


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of Student's 95 % interval; None instead for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, float(spread * stats.t.ppf(0.975, len(values) - 1))


def half_width(share: float, count: int) -> float:
    """Half the 95 % interval of a share, with two successes and two failures added.

    References:
        Agresti and Coull, "Approximate is better than exact for interval estimation of
        binomial proportions", 1998.
    """
    share = (share * count + 2) / (count + 4)
    return float(1.96 * np.sqrt(share * (1 - share) / (count + 4)))


def shown(value: tuple[float, float | None], digits: int = 3) -> str:
    """``3.214 ± 0.012``."""
    mean, half = value
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def smooth(
    points: Sequence[tuple[float, float]], width: int
) -> list[tuple[float, float]]:
    """Means of each ``width`` successive points, at the x of the last of them."""
    return [
        (
            points[end - 1][0],
            sum(y for _, y in points[end - width : end]) / width,
        )
        for end in range(width, len(points) + 1, width)
    ]


def dots(panels: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Any:
    """A figure of numbers with intervals, by name; one panel for each question."""
    figure, axes = side_by_side(panels, 3.6, 3)
    for axis, values in zip(axes, panels.values(), strict=True):
        names = list(values)
        numbers = [number for number, _ in values.values()]
        halves = [half or 0 for _, half in values.values()]
        axis.errorbar(numbers, names, xerr=halves, fmt="o", ms=5)
        for name, number in zip(names, numbers, strict=True):
            axis.annotate(f" {number:.3f}", (number, name), fontsize=8, va="bottom")
        axis.margins(x=0.3, y=0.15)
        axis.invert_yaxis()
    return figure


def write_page(folder: Path, name: str, page: Page, **more: Any) -> Path:
    """Writes ``NAME.md``, ``NAME.json`` and ``NAME-CHART.svg``, each atomically.

    The Markdown file is written last, when everything that it shows exists.

    Args:
        folder: folder of the results.
        name: name of the study.
        page: its result.
        **more: further entries of the JSON file.

    Returns:
        Path of the Markdown file.

    Raises:
        ValueError: if template and page have different values or charts.
    """
    around = surroundings()
    text = filled(page.template, page.values)
    shown = re.findall(r"\((\S+)\.svg\)", text)
    if sorted(shown) != sorted(f"{name}-{chart}" for chart in page.charts):
        raise ValueError(
            f"{page.template}: expected an image of each of {', '.join(page.charts)}, "
            f"got {', '.join(shown)}"
        )
    for chart, figure in page.charts.items():
        save(figure, folder, f"{name}-{chart}", kinds=("svg",))
    content = {"study": name, **around, **more, "results": page.results}
    write_atomically(folder / f"{name}.json", as_json(content).encode())
    versions = ", ".join(f"{n} {v}" for n, v in around["versions"].items())
    where = f"{around['date'][:10]}, {around['machine']}; {versions}"
    text += f"\n`{around['command']}`, {where}.\n"
    path = folder / f"{name}.md"
    write_atomically(path, text.encode())
    return path


def filled(template: Path, values: Mapping[str, object]) -> str:
    """The text of a template with its fields filled in.

    Raises:
        ValueError: if its fields are not exactly ``values``.
    """
    text = template.read_text()
    fields = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    named = {re.split(r"[.\[]", field)[0] for field in fields}
    if named != values.keys():
        raise ValueError(
            f"{template}: expected values {', '.join(sorted(named))}, got "
            f"{', '.join(sorted(values))}"
        )
    return text.format_map(values)
