"""A study's result on one page: Markdown to read, JSON to compute with, SVG to see."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab.bench.charts import plt, save
from attnlab.bench.files import write_atomically
from benchmarks.studies.record import Json, as_json
from benchmarks.studies.training import surroundings

#: By label, points from left to right.
Series = Mapping[str, Sequence[tuple[float, float]]]


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


def lines(
    panels: Mapping[str, Series], across: str, *, marker: str = "o", log: str = ""
) -> Any:
    """A figure of points joined by lines, one panel a quantity.

    Args:
        panels: by title.
        across: what the horizontal axis shows.
        marker: of the points; empty: none.
        log: axes that are logarithmic: ``x``, ``y``, ``xy``.
    """
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels), 4),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        for label, points in series.items():
            if points:
                axis.plot(*zip(*points, strict=True), f"{marker}-", label=label, ms=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(across)
        for name in log:
            axis.set(**{f"{name}scale": "log"})
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        if any(series.values()):
            axis.legend(fontsize=8, frameon=False)
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
