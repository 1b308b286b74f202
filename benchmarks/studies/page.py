"""A study's result on one page: Markdown to read, JSON to compute with, SVG to see."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from attnlab._src.bench.charts import save
from attnlab._src.bench.files import write_atomically
from benchmarks.common import lines as lines
from benchmarks.common import side_by_side
from benchmarks.studies.record import Json, as_json
from benchmarks.studies.training import surroundings


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells; numbers are written as they are given.

    Attributes:
        caption: a sentence.
        header: names of the columns.
        rows: as many cells each.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """With numbers to the right."""
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"rows: expected {len(self.header)} cells in each")
        numeric = [
            all(isinstance(row[i], (int, float)) for row in self.rows)
            for i in range(len(self.header))
        ]
        lines = [self.header, ["--:" if n else "---" for n in numeric], *self.rows]
        cells = [" | ".join(_cell(c) for c in line) for line in map(list, lines)]
        table = "\n".join(f"| {line} |" for line in cells)
        return f"{self.caption}\n\n{table}\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure of Matplotlib, for instance of :func:`lines`.

    Attributes:
        name: of its file, after the study's.
        caption: a sentence.
        figure: drawn.
    """

    name: str
    caption: str
    figure: Any


@dataclasses.dataclass(frozen=True)
class Page:
    """What a study found.

    Attributes:
        title: a question.
        claim: what was tested, and who says so.
        answer: what came out.
        cost: of finding out; see :func:`cost_of`.
        tables: with the numbers.
        charts: with the shape of things.
        results: everything else, as JSON.
    """

    title: str
    claim: str
    answer: str
    cost: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    results: Json = dataclasses.field(default_factory=dict)


def cost_of(summaries: Iterable[Json]) -> str:
    """Time, tokens and sizes of some runs, in a sentence."""
    runs = list(summaries)
    sizes = sorted({run["parameters"] for run in runs})
    between = " to ".join(f"{n:,}" for n in dict.fromkeys([sizes[0], sizes[-1]]))
    minutes = sum(run["seconds"] for run in runs) / 60
    tokens = sum(run["tokens"] for run in runs)
    word = "run" if len(runs) == 1 else "runs"
    machines = "; ".join(dict.fromkeys(run["machine"] for run in runs))
    dates = [run["date"][:10] for run in runs]
    days = " to ".join(dict.fromkeys([min(dates), max(dates)]))
    return (
        f"{len(runs)} {word} of {between} parameters, {tokens:,} target tokens, "
        f"{minutes:,.1f} minutes of training ({machines}, {days})."
    )


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the 95 % interval of Student's t; None for one value alone."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, float(spread * stats.t.ppf(0.975, len(values) - 1))


def shown(value: tuple[float, float | None], digits: int = 3) -> str:
    """``3.214 ± 0.012``."""
    mean, half = value
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def smooth(
    points: Sequence[tuple[float, float]], width: int
) -> list[tuple[float, float]]:
    """Means of ``width`` neighbours, each at the last one's place."""
    return [
        (
            points[end - 1][0],
            sum(y for _, y in points[end - width : end]) / width,
        )
        for end in range(width, len(points) + 1, width)
    ]


def dots(panels: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Any:
    """A figure of numbers by name, with half an interval each, one panel a question."""
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
    """Writes ``NAME.md``, ``NAME.json`` and ``NAME-CHART.svg``, each whole or not.

    The page comes last: what it shows is there.

    Args:
        folder: of the results.
        name: of the study.
        page: what it found.
        **more: for the JSON file.

    Returns:
        Path of the Markdown file.
    """
    around = surroundings()
    for chart in page.charts:
        save(chart.figure, folder, f"{name}-{chart.name}", kinds=("svg",))
    content = {
        "study": name,
        **around,
        **more,
        "title": page.title,
        "claim": page.claim,
        "answer": page.answer,
        "cost": page.cost,
        "tables": [dataclasses.asdict(table) for table in page.tables],
        "results": page.results,
    }
    write_atomically(folder / f"{name}.json", as_json(content).encode())
    known = ", ".join(f"{n} {v}" for n, v in around["versions"].items())
    parts = [
        f"# {page.title}\n",
        f"**Claim.** {page.claim}\n",
        f"**Answer.** {page.answer}\n",
        f"**Cost.** {page.cost}\n",
        *(table.markdown() for table in page.tables),
        *(
            f"![{chart.caption}]({name}-{chart.name}.svg)\n\n{chart.caption}\n"
            for chart in page.charts
        ),
        f"`{around['command']}`, {around['date'][:10]}, {around['machine']}; "
        f"{known}.\n",
    ]
    path = folder / f"{name}.md"
    write_atomically(path, "\n".join(parts).encode())
    return path
