"""The command ``attnlab report``: what it reads, shows and compares."""

import copy
import json
import pathlib
import re
from typing import Any

import pytest

from attnlab._src.bench.cli import main
from attnlab._src.bench.report_page import page_of_runs
from attnlab._src.bench.runs import differences, read_run

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks"
HEAD = {"machine": "two cores", "versions": {"jax": "1.2"}, "date": "2026-01-02"}


def row(contender, pattern="causal", length=64, median=0.002, status="ok", density=0.5):
    spec = {"pattern": pattern, "score": "dot", "dtype": "float32", "length": length}

    def measured():
        ends = (0.98 * median, 1.02 * median) if median != "2" else (1, 3)
        timing = {"median": median, "low": ends[0], "high": ends[1]}
        return {"timing": timing, "temporary_bytes": 10} if status == "ok" else None

    return {
        "spec": spec, "contender": contender, "status": status, "density": density,
        "error": 0.25,
        "reason": "" if status == "ok" else "it has no <masks>",
        "forward": measured(), "both": measured(),
    }  # fmt: skip


RUN: dict[str, Any] = HEAD | {
    "command": "attnlab bench",
    "rows": [
        *(
            row(name, length=length, median=length * 1e-5)
            for length in (64, 128, 256)
            for name in ("native", "torch")
        ),
        row("tiled", "full", 64, 0.004),
        row("flex", "full", 64, status="refused"),
    ],
}


@pytest.fixture
def written(tmp_path):
    def write(content, name="bench.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_run(written, tmp_path, capsys):
    path, out = written(RUN), tmp_path / "out"
    assert main(["report", str(path), "--out", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (out / "report.html").read_text()
    for part in (
        "two cores",
        "jax 1.2",
        "causal · dot, length 128",
        "1.28 (1.25 to 1.31)",
    ):
        assert part in text
    # Text of a file is no markup. Charts of times, of times and memory against the
    # length, each twice.
    assert "it has no &lt;masks&gt;" in text
    assert text.count("<svg ") == 6
    assert "Checked against the reference" in text
    assert text.index("Forward, ms") < text.index("Without a time")


def test_time_against_density(written):
    """Of the length with the most densities, and of one score."""
    rows = [
        row("native", f"pattern {i}", 64, 0.001 * (i + 1), density=(i + 1) / 8)
        for i in range(3)
    ]
    text = page_of_runs([read_run(written(HEAD | {"rows": rows}))]).html
    assert "Forward: time against density" in text
    assert "against the length" not in text


def test_static_files_of_gpus_have_their_kernels(written):
    spec = {"pattern": "full", "score": "dot", "dtype": "bfloat16", "length": 64}
    kernel = {"name": "forward", "registers": 168, "spills": 0}
    row = {"spec": spec, "target": "gpu:h100", "of": "forward", "why": None}
    path = written(HEAD | {"rows": [row | {"kernels": [kernel]}]})
    text = page_of_runs([read_run(path)]).html
    assert "gpu:h100, forward, full · dot" in text
    assert 'data-value="168"' in text


def test_ratios_are_to_attnlabs_best():
    lines = read_run(RESULTS / "results" / "peers-amd-epyc-family-26-model-2.json")
    text = page_of_runs([lines]).html
    assert "2.25x" in text  # PyTorch, dense, 2,048
    assert "call-overhead" in text
    # The bound of reading keys and values is below every contender, and not the best.
    best = re.findall(r'<td class="number best" data-value="([^"]+)"', text)
    bound = [x.median for x in lines.lines if x.contender == "read"]
    assert bound
    assert not {*map(str, bound)} & {*best}


@pytest.mark.parametrize(
    "path", ["results/tpu.json", "studies/results/align.json", "results/scaling.json"]
)
def test_other_files_become_tables(path):
    run = read_run(RESULTS / path)
    assert not run.lines
    assert run.tables
    for title, columns, rows in run.tables:
        assert title
        assert all(len(cells) == len(columns) for cells in rows)
    if "align" in path:
        assert "ibm1" in {c for _, columns, _ in run.tables for c in columns}
        assert dict(run.facts)["title"].startswith("Does attention align")


def test_two_runs_are_compared(written):
    slower = copy.deepcopy(RUN)
    for number, factor in ((0, 1.5), (1, 0.5), (2, 1.05)):
        for direction in ("forward", "both"):
            timing = slower["rows"][number][direction]["timing"]
            slower["rows"][number][direction]["timing"] = {
                name: factor * value for name, value in timing.items()
            }
    runs = [read_run(written(RUN, "a.json")), read_run(written(slower, "b.json"))]
    found = [
        x for x in differences(*(r.lines for r in runs)) if x.after.direction == "both"
    ]
    assert [round(x.ratio, 3) for x in found] == [1.5, 1.05, *[1.0] * 4, 0.5]
    # The intervals of the second overlap.
    assert [x.verdict for x in found] == ["slower", *["same"] * 5, "faster"]
    text = page_of_runs(runs).html
    assert text.count('class="number slower"') == 2
    assert text.index("Both runs") < text.index("<h2>a.json")
    # Other sizes are other problems, also where both files have one size each.
    other = copy.deepcopy(RUN)
    for each in other["rows"]:
        each["spec"]["batch"] = 2
    assert not differences(runs[0].lines, read_run(written(other, "d.json")).lines)
    nothing = read_run(written(HEAD | {"rows": []}, "c.json"))
    assert "no timed problem in common" in page_of_runs([runs[0], nothing]).html


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(RUN)[:-100], "is no complete JSON"),
        ("[1, 2]", "expected a file of attnlab bench"),
        ({"rows": []}, "such files have machine, versions, date"),
        (HEAD | {"rows": [3]}, "its rows are not those of this version"),
        (
            HEAD | {"rows": [row("native", median="2")]},
            "its rows are not those of this version",
        ),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(content, said, written, tmp_path, capsys):
    path = tmp_path / "missing.json" if content is None else written(content)
    out = tmp_path / "deep" / "out"
    assert main(["report", str(path), "--out", str(out)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert str(path.name) in told
    assert not (out / "report.html").exists()
