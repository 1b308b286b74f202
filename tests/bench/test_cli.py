"""The command line: options, interruption, what is written."""

import json
import pathlib
import subprocess
import sys

import pytest

from attnlab._src.bench import (
    cli,
    machine,
    selection,
    show,
    static,
    static_cli,
    text,
    timing,
)
from attnlab._src.bench.contenders import Implementation
from attnlab._src.bench.machine import Peaks
from attnlab._src.bench.report import document, notes, table
from attnlab._src.bench.runner import Group, run
from attnlab._src.bench.timing import Repeats, interleave, summarise
from tests.bench.conftest import SMALL, Wrong, _shifted

PEAKS = Peaks({"float32": 1e9}, 1e9)


@pytest.fixture
def small_run(monkeypatch, tmp_path, text_folder):
    """``start(*groups)`` runs ``attnlab bench``; returns the exit status and JSON."""
    monkeypatch.setattr(machine, "measure_peaks", lambda dtypes, size: PEAKS)
    out = tmp_path / "out"

    def start(*groups):
        monkeypatch.setattr(selection, "select", lambda options: list(groups))
        arguments = ["bench", "--text", str(text_folder), "--out", str(out)]
        code = cli.main([*arguments, "--repeats", "1"])
        path = out / "bench.json"
        return code, json.loads(path.read_text()) if path.exists() else None, out

    return start


class Interrupting(Implementation):
    def refusal(self, case):
        raise KeyboardInterrupt


REFERENCE = Group(SMALL, (Implementation("reference"),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--length", "0"],
            "--length: expected a whole number of at least 16, got '0'",
        ),
        (
            ["--repeats", "x"],
            "--repeats: expected a whole number of at least 1, got 'x'",
        ),
        (["--patterns", "full,foo"], "--patterns: expected names from full, causal"),
        (["--scores", "foo"], "--scores: expected names from scaled_dot"),
        (["--implementations", ""], "--implementations: expected names from native"),
        (["--dtypes", "int8"], "float32, bfloat16, float16, separated by commas, got"),
        (["--heads", "6", "--key-heads", "4"], "--key-heads: expected a divisor of"),
        (["--text", "missing-folder"], "which is no folder"),
        (["--text", "."], "which has none"),
        (["--out", "file/below"], "--out: expected a folder that can be written to"),
        (["--quick", "--full"], "not allowed with argument"),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_without_a_command(capsys):
    assert cli.main([]) == 0
    assert "bench" in capsys.readouterr().out


def test_missing_extra_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert 'pip install "attnlab[bench]"' in capsys.readouterr().err


def test_run_writes_json_and_charts(small_run, capsys):
    code, content, out = small_run(REFERENCE)
    assert (code, content["complete"], content["format"]) == (0, True, 1)
    assert sorted(p.name for p in out.iterdir()) == [
        "bench.json",
        "memory.png",
        "memory.svg",
        "report.html",
        "time.png",
        "time.svg",
    ]
    assert set(content) >= {"command", "machine", "versions", "date", "peaks", "rows"}
    assert content["command"].startswith("attnlab bench --text")
    (row,) = content["rows"]
    assert row["spec"]["length"] == SMALL.length
    for direction in ("forward", "both"):
        measured = row[direction]
        assert measured["timing"]["repeats"] == 1
        assert measured["compile_seconds"] > 0
        assert measured["temporary_bytes"] > 0
        assert measured["of_tanh_bound"] is None
        expected = measured["useful_flops"] / measured["timing"]["median"] / 1e9
        assert measured["of_matmul_peak"] == pytest.approx(expected)
    assert "causal · scaled_dot" in capsys.readouterr().out


def test_interrupted_run_keeps_its_rows(small_run, capsys):
    code, content, out = small_run(REFERENCE, Group(SMALL, (Interrupting("tiled"),)))
    assert (code, content["complete"]) == (130, False)
    assert [row["contender"] for row in content["rows"]] == ["reference"]
    assert (out / "time.svg").exists()
    assert interruption(capsys) == "interrupted: keeping what was measured"


def interruption(capsys):
    """The one message of an interruption."""
    (said,) = (x for x in capsys.readouterr().err.splitlines() if "interrupted" in x)
    return said


def test_interrupted_before_anything_was_measured(small_run, capsys):
    code, content, out = small_run(Group(SMALL, (Interrupting("tiled"),)))
    assert (code, content) == (130, None)
    assert interruption(capsys) == "interrupted: nothing was measured"
    assert not out.exists()


def stop(*_, **__):
    raise KeyboardInterrupt


def test_interrupted_while_the_text_is_read(small_run, capsys, monkeypatch):
    monkeypatch.setattr(text, "load_documents", stop)
    code, content, out = small_run(REFERENCE)
    assert (code, content) == (130, None)
    assert interruption(capsys) == "interrupted: nothing was measured"
    assert not out.exists()


@pytest.mark.parametrize("command", ["show", "static"])
def test_other_commands_interrupted_early(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(show, "_counted", stop)
    monkeypatch.setattr(static, "row", stop)
    monkeypatch.setattr(static_cli.jax.config, "update", lambda *_: None)
    out = tmp_path / "deep" / "out"
    given = ["causal()"] if command == "show" else []
    assert cli.main([command, *given, "--out", str(out)]) == 130
    wanted = {"show": "attnlab: interrupted", "static": "interrupted: nothing is known"}
    assert interruption(capsys) == wanted[command]
    assert not out.parent.exists()


def test_interrupted_while_importing():
    program = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jax': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from attnlab._src import command\n"
        "sys.exit(command.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "bench"],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "attnlab: interrupted\n")


def test_failure_is_shown_without_a_time(small_run, capsys):
    code, content, out = small_run(Group(SMALL, (Wrong(_shifted),)))
    assert code == 1
    assert content["rows"][0]["status"] == "failed"
    assert content["rows"][0]["both"] is None
    assert "FAILED: wrong" in capsys.readouterr().out
    assert not (out / "time.svg").exists()


def test_document_is_plain_json(documents):
    rows = [row for rows in run([REFERENCE], documents, Repeats(1, 1)) for row in rows]
    content = document(rows, PEAKS, ["attnlab", "bench", "a b"], complete=True)
    assert content["command"] == "attnlab bench 'a b'"
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert table(rows, PEAKS, "title").row_count == 1
    assert any("50" in line or "visible" in line for line in notes(rows, PEAKS))


def test_selection_covers_every_name():
    from attnlab._src.bench.cases import PATTERNS, SCORES
    from attnlab._src.bench.options import Options

    groups = selection.select(Options())
    names = {c.name for g in groups for c in g.contenders + g.beside}
    assert {g.spec.pattern for g in groups} == set(PATTERNS)
    assert {g.spec.score for g in groups} == set(SCORES) - {"concat"}
    assert {"tiled", "jax_nn", "reference", "jax.nn", "flax.nnx"} <= names
    full = selection.select(Options(full=True))
    assert len(full) == len(PATTERNS) * len(SCORES)
    assert all(
        not g.beside
        for g in selection.select(Options(implementations=("tiled",), peers=False))
    )


def test_interleaving_turns_the_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(calls, Repeats(3, 3), warm=True)
    assert "".join(order) == "abccbabca"
    assert [t.repeats for t in timings.values()] == [3, 3, 3]


def test_quantiles():
    found = summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert found == pytest.approx((3.5, 2.0, 5.0, 6))


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only by what tests add to it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_a_call_that_settles_is_timed_behind_itself(clock):
    order = []

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds * (3 if order[-2:-1] != [name] else 1)

    calls = {"a": lambda: call("a", 2.0), "b": lambda: call("b", 4.0)}
    found = interleave(calls, Repeats(2, 2, settle=8.0), warm=True)
    # First call, calls that warm up, calls that count: 1 + 4 + 4, and 1 + 2 + 2.
    assert "".join(order) == "a" * 9 + "b" * 10 + "a" * 9
    assert found["a"] == summarise([2.0] * 8)
    assert found["b"] == summarise([4.0] * 4)


def test_a_call_longer_than_it_settles_runs_once(clock):
    def call():
        clock[0] += 3.0

    found = interleave({"a": call}, Repeats(2, 2, settle=1.0), warm=True)
    assert found["a"] == summarise([3.0] * 2)


def test_a_call_that_its_neighbour_slows_down_settles_all_the_same(clock):
    seconds = iter([1.0, 9.0, *[1.0] * 8])

    def call():
        clock[0] += next(seconds)

    found = interleave({"a": call}, Repeats(1, 1, settle=4.0))
    assert found["a"] == summarise([1.0] * 4)
