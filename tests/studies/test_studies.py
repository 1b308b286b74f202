"""Each study from end to end, tiny: what users start, and what it leaves."""

import json

import pytest

from benchmarks.studies import __main__ as script

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
    for i in range(1500):
        chosen = [clauses[(i * 37 + j * j * (i + 5)) % 64] for j in range(1 + i % 12)]
        one, other = (", ".join(side) for side in zip(*chosen, strict=True))
        yield f"{one} {i}", f"{other} {i}"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pairs.tsv"
    path.write_text("".join(f"{one}\t{other}\n" for one, other in sentences()))
    return path


@pytest.mark.parametrize("study", ["align", "translate", "bottleneck", "scores"])
def test_study(study, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "ask_for_devices", lambda count: None)
    given = ["--quick", "--devices", "2", "--pairs", str(table), "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.warnings, "showwarning", None)
        assert script.main([study, *given]) == 0, capsys.readouterr().err
    folder = tmp_path / "quick"
    page = (folder / f"{study}.md").read_text()
    content = json.loads((folder / f"{study}.json").read_text())
    assert content["quick"] is True
    for part in ("Claim", "Answer", "Cost"):
        assert f"**{part}.**" in page
    charts = [p for p in folder.glob(f"{study}-*.svg") if p.name in page]
    assert charts
    trained = {p.parent.name for p in folder.glob("runs/translators/*/summary.json")}
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
        assert len(content["tables"][0]["rows"]) == 6
