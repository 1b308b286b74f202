"""The charts of ``attnlab report``, as SVG."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from attnlab._src.bench.runs import OURS, Estimate, Line


class Chart(NamedTuple):
    """A chart, as SVG; a table of the page has its numbers."""

    title: str
    svg: str


def contenders_of(lines: Sequence[Line]) -> list[str]:
    """All contenders, attnlab's own first."""
    names = dict.fromkeys(x.contender for x in lines)
    ours = [n for n in OURS if n in names]
    return [*ours, *(n for n in names if n not in ours)]


def charts_of(title: str, lines: Sequence[Line]) -> Iterator[Chart]:
    """Charts of one direction: times, and what else the file has enough points for."""
    yield _bars(title, lines)
    timed = [(x, x.length, 1e3 * x.median) for x in lines if x.median]
    label = "ms, least of the problems of a length"
    yield from _curves(f"{title}: time against the length", timed, "length", label)
    held = [(x, x.length, x.memory / 1e6) for x in lines if x.median and x.memory]
    label = "MB beside inputs and outputs"
    yield from _curves(f"{title}: memory against the length", held, "length", label)
    # Of the problems that differ in the mask alone, those of which there are most.
    known = [x for x in lines if x.median and x.density is not None]
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in known:
        score = line.problem.split(" · ")[-1]
        groups.setdefault((line.length, score), []).append(line)
    most = max(groups.values(), key=lambda g: len({x.density for x in g}), default=[])
    shown = [(x, 100 * (x.density or 0), 1e3 * (x.median or 0)) for x in most]
    name = f"{title}: time against density"
    yield from _curves(name, shown, "visible pairs, %", "ms")


def _svg(figure: Any) -> str:
    """A figure as SVG text, without a header; ids differ between figures."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": None, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _bars(title: str, lines: Sequence[Line]) -> Chart:
    """Time by problem and contender, with its spread."""
    from attnlab._src.bench.charts import colour, plain_log, plt

    names = contenders_of(lines)
    timed = [(x, x.median) for x in lines if x.median]
    problems = [*dict.fromkeys(x.problem for x, _ in timed)]
    height = 1.2 + 0.16 * len(timed) + 0.25 * len(problems)
    figure, axis = plt.subplots(figsize=(9, height), layout="constrained")
    place, ticks = 0.0, []
    for problem in problems:
        group = [each for each in timed if each[0].problem == problem]
        ticks.append(place + (len(group) - 1) / 2)
        for line, median in sorted(group, key=lambda x: names.index(x[0].contender)):
            shade = colour(line.contender, names)
            axis.barh(place, 1e3 * median, 0.9, color=shade)
            if line.low and line.high:
                ends = [1e3 * line.low, 1e3 * line.high]
                axis.plot(ends, [place] * 2, color="0.3", linewidth=1)
            place += 1
        place += 0.8
    plain_log(axis.xaxis)
    axis.set_yticks(ticks, problems)
    axis.invert_yaxis()
    axis.set_xlabel("ms, median and 20 to 80 %, log scale")
    axis.spines[["top", "right"]].set_visible(False)
    present = [n for n in names if any(x.contender == n for x, _ in timed)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour(n, names)) for n in present]
    figure.legend(
        handles,
        present,
        loc="outside upper center",
        ncols=min(len(present), 6),
        frameon=False,
    )
    return Chart(f"{title}: time", _svg(figure))


def _curves(
    title: str,
    points: Sequence[tuple[Line, float, float]],
    across: str,
    up: str,
) -> Iterator[Chart]:
    """A curve for each contender, with guides, if there are at least three points."""
    from attnlab._src.bench.charts import colour, plain_log, plt

    places = sorted({x for _, x, _ in points})
    if len(places) < 3 or places[0] <= 0:
        return
    names = contenders_of([line for line, _, _ in points])
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in names:
        least: dict[float, float] = {}
        for line, x, y in points:
            if line.contender == name:
                least[x] = min(y, least.get(x, y))
        xs = sorted(least)
        ys = [least[x] for x in xs]
        axis.plot(xs, ys, "o-", ms=3, color=colour(name, names), label=name)
    first = min(y for _, _, y in points)
    for power, style in ((1, ":"), (2, "--"))[: 2 if across == "length" else 1]:
        guide = [first * (x / places[0]) ** power for x in places]
        label = "proportional" if power == 1 else "squared"
        axis.plot(places, guide, style, color="0.6", linewidth=1, label=label)
    for one in (axis.xaxis, axis.yaxis):
        plain_log(one)
    axis.set(xlabel=across, ylabel=up)
    axis.legend(frameon=False)
    yield Chart(title, _svg(figure))


def cycles(found: Sequence[Estimate]) -> Iterator[Chart]:
    """Cycles by problem, and the bound of each."""
    from attnlab._src.bench.charts import plain_log, plt

    known = [(x, x.cycles) for x in found if x.cycles]
    if not known:
        return
    size = (9, 1.2 + 0.35 * len(known))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for place, (each, value) in enumerate(known):
        axis.barh(place, value, 0.8, color="C0", label="cycles" if not place else None)
        if each.least:
            label = "the bound" if not place else None
            axis.plot([each.least] * 2, [place - 0.4, place + 0.4], "k", label=label)
    axis.set_yticks(range(len(known)), [x.problem for x, _ in known])
    axis.invert_yaxis()
    plain_log(axis.xaxis)
    axis.set_xlabel("cycles of one core, log scale")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    yield Chart("Static estimates: cycles", _svg(figure))
