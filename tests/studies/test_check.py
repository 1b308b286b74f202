"""``--check``, and the fit and crossings of the crossover study."""

import json

import pytest

from attnlab._src.implementations.measured import read
from benchmarks.studies import __main__ as script
from benchmarks.studies.crossover.page import crossing, density_below
from benchmarks.studies.crossover.study import Fit, fit, for_dispatch
from benchmarks.studies.machinery.check import committed, differences
from benchmarks.studies.machinery.errors import StudyError


def content(**losses):
    runs = {n: {"loss": v, "step": 3} for n, v in losses.items()}
    return {"runs": runs, "results": {}}


def test_differences():
    old = content(plain=4.0, additive=3.0)
    assert differences(old, content(plain=4.003, additive=2.998)) == []
    (line,) = differences(old, content(plain=4.01, additive=3.0))
    assert line == "runs.plain.loss: was 4, is 4.01"
    found = differences(old, content(plain=4.5, other=1.0))
    assert found == [
        "runs.additive.loss: was 3, is nan",
        "runs.additive.step: was 3, is nan",
        "runs.other.loss: was nan, is 1",
        "runs.other.step: was nan, is 3",
        "runs.plain.loss: was 4, is 4.5",
    ]


def test_every_number_counts_but_times():
    old = {"runs": {}, "results": {"a": [1, {"b": 2.0}], "name": "x", "seconds": 1}}
    new = {"runs": {}, "results": {"a": [1, {"b": 2.5}], "name": "x", "seconds": 9}}
    assert differences(old, old) == []
    assert differences(old, new) == ["results.a[1].b: was 2, is 2.5"]


@pytest.mark.parametrize("study", script.STUDIES)
def test_every_study_has_numbers_to_compare_with(study):
    content = committed(script.EXPECTED / f"{study}.json")
    assert content["study"] == study
    assert content["quick"] is True
    assert {"devices", "runs", "results"} <= set(content)
    assert differences(content, content) == []


def test_nothing_to_compare_with(tmp_path):
    with pytest.raises(StudyError, match=r"--check: there is no .*none\.json"):
        committed(tmp_path / "none.json")


@pytest.mark.slow
def test_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "ask_for_devices", lambda count: None)
    monkeypatch.setattr(script, "EXPECTED", tmp_path / "quick")
    arguments = ["attention-graph", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(script.warnings, "showwarning", None)
        assert script.main([*arguments, "--check"]) == 1
        assert "there is no" in " ".join(capsys.readouterr().err.split())
        assert script.main([*arguments, "--quick", "--devices", "2"]) == 0
        assert script.main([*arguments, "--check"]) == 0
        assert "equal to the committed results" in capsys.readouterr().out
        path = tmp_path / "quick" / "attention-graph.json"
        changed = json.loads(path.read_text())
        changed["results"]["causal"]["window"]["mean_path"] *= 2
        path.write_text(json.dumps(changed))
        assert script.main([*arguments, "--check"]) == 1
        assert "results.causal.window.mean_path: was" in " ".join(
            capsys.readouterr().err.split()
        )


def rows(seconds):
    return [
        {
            "series": name,
            "length": length,
            "pairs_executed": 8 * pairs,
            "blocks": blocks,
            "seconds": {"forward": seconds(8 * length, 8 * pairs, blocks)},
        }
        for length in (128, 256, 512, 1024)
        for name, pairs, blocks in (
            ("full", length**2, length // 8),
            ("window", 100 * length, 7),
        )
    ]


def test_fit_finds_what_time_is_made_of():
    true = Fit(2e-5, 3e-9, 4e-11, 5e-8, 0, 0)
    found = fit(rows(true.seconds), "forward")
    assert found[:4] == pytest.approx(true[:4], rel=1e-6)
    assert found.worst < 1e-6


def test_where_a_ratio_crosses_one():
    # A pair takes four times as long, with a hundred pairs per query: faster from 400.
    points = [(n, 400 / n) for n in (128, 256, 512, 1024)]
    assert crossing(points) == (pytest.approx(400), False)
    assert crossing([(n, y / 10) for n, y in points]) == (128, True)
    assert crossing([(n, 10 * y) for n, y in points]) == (None, False)
    # The last crossing counts.
    assert crossing([(1, 0.5), (2, 2.0), (8, 0.5)]) == (pytest.approx(4), False)


def test_below_which_density():
    points = [(x, 2 * x) for x in (0.1, 0.3, 0.7, 1.0)]
    assert density_below(points) == "50%"
    assert density_below([(x, 0.9 * x) for x, _ in points]) == "100%"
    assert density_below([(x, 1.1) for x, _ in points]) == "none"


def test_what_the_dispatch_gets(tmp_path):
    times = Fit(1e-5, 1e-9, 1e-10, 1e-7, 0.1, 0.2)
    fits = {"forward": times, "training": times}
    content = for_dispatch(fits, [(2**15, 40.0), (2**19, 90.0)], "native")
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    found = read(path)
    assert found.fits == {"native": fits}
    assert found.tile_rates == ((2**19, 90.0), (0, 40.0))


def test_an_interrupted_check_is_not_resumed(monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "check", stop)
    monkeypatch.setattr(script, "run", stop)
    arguments = ["attention-graph", "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 130
    assert "interrupted; continue with: python -m" in capsys.readouterr().err
    assert script.main([*arguments, "--check"]) == 130
    assert capsys.readouterr().err == "interrupted: a check keeps no results\n"
    assert not (tmp_path / "out").exists()
