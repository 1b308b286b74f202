"""The page, the command line, sweeps."""

import dataclasses
import io
import json
import math
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import studies
from benchmarks.studies import __main__ as script
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.errors import Diverged, StudyError
from benchmarks.studies.machinery.page import (
    Page,
    cost_of,
    filled,
    lines,
    smooth,
    table,
    write_page,
)
from benchmarks.studies.machinery.parallel import make_mesh
from benchmarks.studies.machinery.sweep import sweep, train_at_best_rate
from tests.studies import smoke
from tests.studies.tiny import make_run

WHY = (
    "# Why?\n\n**Answer.** {size:.1f}, {best[loss]:g}.\n\n{who}\n\n![See](why-it.svg)\n"
)


@pytest.fixture
def why(tmp_path):
    """``why(text)`` writes a template and returns its path."""

    def write(text=WHY):
        path = tmp_path / "page.md"
        path.write_text(text)
        return path

    return write


def values():
    rows = [["a|b", 12.3456, 1234]]
    who = table(["who", "BLEU", "n"], rows)
    return {"size": 1.25, "best": {"loss": 3}, "who": who}


def test_a_page(tmp_path, why):
    figure = lines({"y": {"one": [(1, 2), (2, 3)]}}, "x", log="y")
    page = Page(why(), values(), {"it": figure}, {"size": 1.25})
    path = write_page(tmp_path / "new", "why", page, quick=True)
    text = path.read_text()
    assert text.startswith("# Why?\n\n**Answer.** 1.2, 3.\n\n")
    assert "| who | BLEU | n |\n| --- | --: | --: |\n| a\\|b | 12.35 | 1,234 |" in text
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "why-it.svg",
        "why.json",
        "why.md",
    ]
    content = json.loads((path.parent / "why.json").read_text())
    assert (content["results"], content["quick"]) == ({"size": 1.25}, True)
    assert {"machine", "versions", "date", "command"} <= set(content)
    assert (path.parent / "why-it.svg").read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="expected 3 cells"):
        table(["a", "b", "c"], [[1, 2]])


def test_a_template_names_what_there_is(tmp_path, why):
    with pytest.raises(ValueError, match=r"page.md: expected values best, .*got best"):
        filled(why(), values() | {"more": 1})
    with pytest.raises(ValueError, match="image of each of other, got why-it"):
        write_page(tmp_path / "new", "why", Page(why(), values(), {"other": None}))
    assert not (tmp_path / "new").exists()


def test_no_study_imports_another():
    folder = Path(studies.__file__).parent
    for path in folder.glob("*/**/*.py"):
        own = path.relative_to(folder).parts[0]
        seen = re.findall(
            r"^\s*(?:from|import) benchmarks\.studies\.(\w+)", path.read_text(), re.M
        )
        assert {*seen} <= {"machinery", own}, path


def test_what_it_cost():
    run = {
        "seconds": 90.0,
        "tokens": 2_000_000,
        "machine": "M",
        "date": "2020-02-03T04",
    }
    runs = [{**run, "parameters": n} for n in (1_000_000, 2_500_000)]
    assert cost_of(runs) == (
        "Training runs: 2; parameters of each: 1,000,000 to 2,500,000; target tokens: "
        "4,000,000; minutes: 3.0 (M, 2020-02-03)."
    )


def test_means_of_neighbours():
    points = [(1, 1.0), (2, 3.0), (3, 5.0), (4, 9.0), (5, 0.0)]
    assert smooth(points, 2) == [(2, 2.0), (4, 7.0)]


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """``run(*options)`` runs the smoke study; returns exit status and output."""
    monkeypatch.setitem(script.STUDIES, "smoke", smoke.study)
    monkeypatch.setattr(script, "ask_for_devices", lambda count: None)

    def run(*given):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script.warnings, "showwarning", None)
            given = ["smoke", "--quick", "--devices", "2", *given]
            status = script.main([*given, "--out", str(tmp_path)])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    return run


@pytest.mark.slow
def test_a_study_from_end_to_end(start, tmp_path, monkeypatch):
    status, said = start("--only", "state-16")
    assert (status, "no page yet" in said) == (0, True)
    folder = tmp_path / "quick"
    assert not (folder / "smoke.md").exists()
    first = json.loads((folder / "runs/smoke/state-16/summary.json").read_text())

    before = smoke.Symbols.batch_at

    def stop(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return before(self, step)

    monkeypatch.setattr(smoke.Symbols, "batch_at", stop)
    status, said = start("--resume")
    assert status == 130
    assert "state-8: interrupted after step 4" in said
    assert "--resume" in said
    monkeypatch.setattr(smoke.Symbols, "batch_at", before)

    status, said = start("--resume")
    assert status == 0
    assert "written:" in said
    content = json.loads((folder / "smoke.json").read_text())
    assert [row[0] for row in content["results"]["rows"]] == [8, 16]
    assert (folder / "smoke-loss.svg").exists()
    assert "| state | loss | 1 symbols |" in (folder / "smoke.md").read_text()
    again = json.loads((folder / "runs/smoke/state-16/summary.json").read_text())
    assert again == first

    status, said = start("--resume", "--only", "state-17")
    assert status == 1
    assert "expected runs of smoke (state-8, state-16), got 'state-17'" in said


def test_a_run_that_is_not_there_is_told_before_steps_are_timed(tmp_path):
    given = ["short", "shrot"]
    context = Context("s", tmp_path, make_mesh(2), Console(), only=given)
    run = make_run("short/one", mesh=context.mesh, steps=2)
    context.train(run)
    timed = dataclasses.replace(run, make_model=lambda: pytest.fail("it is timed"))
    with pytest.raises(StudyError, match=r"runs of s \(short/one\), got 'shrot'"):
        context.step_seconds([timed])


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        script.main(["align", "--out", str(tmp_path / "file" / "below")])
    assert "expected a folder that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "two", "-1"])
def test_devices_are_counted(count, capsys):
    with pytest.raises(SystemExit):
        script.arguments(["align", f"--devices={count}"])
    assert "expected a whole number of at least 1" in capsys.readouterr().err


def test_the_best_rate(tmp_path):
    mesh = make_mesh(2)
    said = io.StringIO()
    context = Context("s", tmp_path, mesh, Console(file=said), resume=True)
    losses = {0.5: 3.0, 0.1: 1.0, 0.02: 2.0}

    def at(rate):
        def evaluate(model):
            if rate not in losses:
                raise Diverged(f"no {rate}")
            return {"loss": losses[rate]}

        return make_run("short", mesh=mesh, evaluate=evaluate, steps=4)

    found = sweep(context, at, [0.5, 0.1, 0.02, 9.0])
    assert found[:2] == (0.1, {**losses, 9.0: None})
    assert [s["name"] for s in found.summaries] == [
        f"short/rate-{r}" for r in (0.5, 0.1, 0.02)
    ]
    assert "no 9.0" in said.getvalue()
    folders = sorted(p.name for p in (context.folder / "short").iterdir())
    assert folders == ["rate-0.02", "rate-0.1", "rate-0.5", "rate-9"]
    losses.clear()
    with pytest.raises(Diverged, match="every rate of 7.0, 8.0 diverges"):
        sweep(context, at, [7.0, 8.0])
    only = Context("s", tmp_path, mesh, Console(file=said), only=["long"])
    assert sweep(only, at, [6.0, 5.0]) is None
    assert sweep(only, at, [6.0]) == (6.0, {}, [])  # a single rate is not tried


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        pytest.param(2.0, [1.0, 2.0, 4.0], marks=pytest.mark.slow),
        pytest.param(4.0, [1.0, 2.0, 4.0, 8.0], marks=pytest.mark.slow),
        (0.5, [1.0, 2.0, 4.0, 0.5, 0.25]),
        # The sweep ends after three further rates.
        pytest.param(64.0, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], marks=pytest.mark.slow),
    ],
)
def test_a_sweep_goes_on_where_its_best_rate_is_the_last(best, tried, tmp_path):
    mesh = make_mesh(2)
    context = Context("s", tmp_path, mesh, Console(file=io.StringIO()))

    def at(rate):
        def evaluate(model):
            return {"loss": abs(math.log2(rate / best))}

        return make_run("short", mesh=mesh, evaluate=evaluate, steps=2)

    found = sweep(context, at, [1.0, 2.0, 4.0])
    assert list(found.found) == tried
    assert found.rate == min(tried, key=lambda rate: abs(math.log2(rate / best)))
    assert len(found.summaries) == len(tried)


@pytest.mark.slow
@pytest.mark.parametrize(("at_last", "rate"), [({2.0: 1.0, 1.0: 0.5}, 1.0),
                                              ({2.0: 0.5, 1.0: 1.0}, 2.0)])  # fmt: skip
def test_whole_runs_decide(at_last, rate, tmp_path):
    """Whole runs at the best rate of short runs and at the next lower one decide."""
    mesh = make_mesh(2)
    context = Context("s", tmp_path, mesh, Console(file=io.StringIO()))
    at_first = {1.0: 3.0, 2.0: 1.0, 4.0: 2.0}

    def make(rate, short):
        losses = at_first if short else at_last

        def evaluate(model):
            return {"loss": losses[rate]}

        return make_run("run", mesh=mesh, evaluate=evaluate, steps=2)

    found = train_at_best_rate(context, make, [1.0, 2.0, 4.0])
    assert (found.rate, found.whole) == (rate, at_last)
    assert found.trained.summary["best"]["loss"] == at_last[rate]
    names = [s["name"] for s in found.summaries]
    assert names == [f"run/rate-{r}" for r in (1, 2, 4)] + [
        "run/whole-2",
        "run/whole-1",
    ]
