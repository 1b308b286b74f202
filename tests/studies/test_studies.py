"""The quick form of each study, from the command line to its files."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from attnlab._src.implementations.measured import read
from benchmarks.studies import __main__ as script
from benchmarks.studies.ablations import changes
from benchmarks.studies.machinery.check import committed, numbers
from benchmarks.studies.machinery.data.puzzles import VALUES
from benchmarks.studies.machinery.models.long_contexts import PARTS
from benchmarks.studies.next_word.study import MODELS
from benchmarks.studies.patterns_lm import study as patterns_lm
from tests.grid import few

SLOW = pytest.mark.slow
WHO = {"il": "he", "elle": "she", "nous": "we", "qui": "who"}
WHAT = {"mange": "eats", "dort": "sleeps", "chante": "sings", "parle": "speaks"}
WHERE = {"ici": "here", "là": "there", "dehors": "outside", "partout": "everywhere"}


def sentences():
    """French and English, 1 to 12 clauses, no two alike."""
    clauses = [
        (f"{a} {b} {c}", f"{WHO[a]} {WHAT[b]} {WHERE[c]}")
        for a in WHO
        for b in WHAT
        for c in WHERE
    ]
    for i in range(200):
        chosen = [clauses[(i * 37 + j * j * (i + 5)) % 64] for j in range(1 + i % 12)]
        one, other = (", ".join(side) for side in zip(*chosen, strict=True))
        yield f"{one} {i}", f"{other} {i}"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pairs.tsv"
    path.write_text("".join(f"{one}\t{other}\n" for one, other in sentences()))
    return path


@pytest.fixture
def quick(table, long_texts, tmp_path, monkeypatch, capsys):
    """``quick(study)`` runs its quick form, and returns the folder of its results."""
    monkeypatch.setattr(script, "ask_for_devices", lambda count: None)

    def start(study):
        given = ["--quick", "--devices", "2", "--out", str(tmp_path)]
        given += ["--pairs", str(table), "--text", str(long_texts)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script.warnings, "showwarning", None)
            assert script.main([study, *given]) == 0, capsys.readouterr().err
        return tmp_path / "quick"

    return start


@SLOW
@pytest.mark.parametrize("study", ["align", "translate", "bottleneck", "scores"])
def test_study(study, quick):
    folder = quick(study)
    page = (folder / f"{study}.md").read_text()
    content = json.loads((folder / f"{study}.json").read_text())
    assert content["quick"] is True
    for part in ("Claim", "Answer", "Cost"):
        assert f"**{part}.**" in page
    charts = [p for p in folder.glob(f"{study}-*.svg") if p.name in page]
    assert charts
    summaries = folder.glob("runs/translators/*/whole-*/summary.json")
    trained = {path.parent.parent.name for path in summaries}
    assert names(content) == names(committed(script.EXPECTED / f"{study}.json"))
    if study == "align":
        assert trained == {"additive"}
        assert content["results"]["rates"]["he"]["count"] > 0
    elif study == "translate":
        assert (
            trained
            == {"plain", "additive", "transformer"}
            == set(content["results"]["scores"])
        )
    elif study == "bottleneck":
        exact = content["results"]["exact"]
        assert {len(points) for points in exact.values()} == {3}
        assert {len(rows) for rows in content["results"]["classes"].values()} == {4}
    else:
        assert len(content["results"]["scores"]) == 6


def names(content):
    """Names of the numbers that ``--check`` compares, without list indices."""
    found = {re.sub(r"\[\d+\]", "[]", name) for name in numbers(content)}
    return {name for name in found if not name.startswith("results.counts.")}


def results(folder, study):
    content = json.loads((folder / f"{study}.json").read_text())
    page = (folder / f"{study}.md").read_text()
    assert all(f"**{part}.**" in page for part in ("Claim", "Answer", "Cost"))
    for chart in folder.glob(f"{study}-*.svg"):
        assert chart.name in page
    assert names(content) == names(committed(script.EXPECTED / f"{study}.json"))
    return content["results"]


@SLOW
def test_patterns_lm(quick):
    found = results(quick("patterns-lm"), "patterns-lm")
    assert {row["pattern"] for row in found["masked"]} == set(
        patterns_lm.QUICK_PATTERNS
    )
    assert {row["pattern"] for row in found["causal"]} < set(patterns_lm.CAUSAL)
    for row in found["masked"]:
        assert len(row["by_position"]) == PARTS
        useful, executed = row["attention_flops_per_token"]
        assert 0 < useful <= executed


@SLOW
def test_selection(quick):
    found = results(quick("selection"), "selection")
    rows = {row["pattern"]: row for row in found["models"]}
    assert set(rows) == {"full", "window", "mixture of blocks", "indexed"}
    # 128 positions: blocks of one key, or lists of six.
    assert rows["mixture of blocks"]["keys_seen"] == pytest.approx(6, abs=0.2)
    assert rows["indexed"]["keys_seen"] == pytest.approx(6, abs=0.2)
    for name in ("mixture of blocks", "indexed"):
        for layer in rows[name]["selected"]:
            assert sum(layer["keys"]) == pytest.approx(1, abs=1e-4)
            assert 0 < layer["alike"] <= 1 + 1e-6
    assert [layer["alike"] for layer in rows["indexed"]["selected"]] == (
        pytest.approx([1, 1])
    )
    assert set(found["recall"]) == {"base", "full", "native sparse"}


@SLOW
def test_recall(quick):
    found = results(quick("recall"), "recall")
    for puzzle in ("reach", "recall"):
        full, window = found[puzzle]
        near, far = full["at"]
        assert (near["predicted"], far["predicted"], full["connected"]) == (1, 1, 1)
        assert window["at"][1]["predicted"] == 1 / VALUES
        assert window["connected"] < 0.2
    assert len(found["listops"]) == 2


@SLOW
def test_ablations(quick):
    found = results(quick("ablations"), "ablations")
    assert set(found["runs"]) == set(changes.CHANGES) - changes.NOT_QUICK
    assert found["order"]["masked"]["none"] < 1e-5
    assert min(v for n, v in found["order"]["masked"].items() if n != "none") > 1e-3
    dot, scaled = (
        found["runs"][f"{n}/256"]["untrained"] for n in ("dot", "scaled_dot")
    )
    ratio = np.divide(dot["deviation"], scaled["deviation"])
    np.testing.assert_allclose(ratio, 16, rtol=1e-3)


@SLOW
def test_next_word(quick):
    folder = quick("next-word")
    found = results(folder, "next-word")
    for text in ("addresses", "verses"):
        one = found[text]
        assert set(one["models"]) == set(MODELS)
        assert sum(row["share"] for row in one["distances"]["all tokens"]) == (
            pytest.approx(1)
        )
        for part in ("kinds", "back"):
            shares = [look["share"][0] for look in one["looks"][part].values()]
            assert sum(shares) == pytest.approx(1, abs=1e-4)
        for entry in found["sentences"][text]:
            assert sum(entry["weights"]) == pytest.approx(1, abs=1e-3)
    assert "opened" in (folder / "next-word-weights.html").read_text()


@SLOW
def test_crossover(quick):
    folder = quick("crossover")
    found = results(folder, "crossover")
    (name,) = read(folder / "measured.json").fits
    assert name == found["rows"][0]["implementation"]
    shares = {r["series"]: r["density"] for r in found["rows"] if " of " in r["series"]}
    assert shares["window of 12.5%"] == pytest.approx(0.125, abs=0.01)


def test_attention_graph(quick):
    found = results(quick("attention-graph"), "attention-graph")
    both = found["both directions"]
    assert both["window+anchor"]["layers"] == 2 < both["window"]["layers"]
    assert both["dilated"]["unreachable"] > 0.7


@pytest.mark.parametrize("name", few(["rich", "orbax", "sacrebleu"], "orbax"))
def test_what_must_be_installed_is_named(name):
    code = f"import runpy, sys; sys.modules[{name!r}] = None; sys.argv = ['x', 'align']"
    code += ";runpy.run_module('benchmarks.studies', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"benchmarks.studies: needs {name}")
    assert done.stderr.endswith('which comes with pip install -e ".[studies]"\n')
    assert done.stderr.count("\n") == 1
