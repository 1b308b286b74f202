"""The benchmark scripts: tables, resuming, and contenders that only they have."""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest

from attnlab._src.bench import contenders, gate
from attnlab._src.bench.cases import PATTERNS, build
from attnlab._src.bench.contenders import Implementation
from attnlab._src.bench.peers import PEERS, _rule
from attnlab._src.bench.runner import Group, run
from attnlab._src.bench.timing import Repeats
from attnlab._src.bench.yardsticks import YARDSTICKS
from benchmarks import common, peers, training_step
from benchmarks.problems import OURS, PROBLEMS, Problem, small
from tests.bench.conftest import SMALL, Wrong, _shifted
from tests.grid import few, in_turn

ONCE = Repeats(1, 1)
DECODE = dataclasses.replace(SMALL, pattern="full", length=64, query_length=1, heads=6)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


def statuses(spec, contenders, documents, directions):
    group = Group(spec, tuple(contenders), directions=directions)
    ((*rows,),) = run([group], documents, ONCE)
    return {row.contender: (row.status, row.reason) for row in rows}


@pytest.mark.slow
def test_lines_are_named_once_and_can_be_built(documents):
    names = [p.name for p in PROBLEMS] + list(peers.OVERHEADS)
    assert len(set(names)) == len(names)
    assert not {p.group for p in PROBLEMS} & set(names)
    for problem in PROBLEMS:
        assert [c.name for c in problem.contenders] == [*OURS, *problem.others]
        case = build(small(problem).spec, documents)
        assert case.query.shape[1] == (small(problem).spec.queries)
        assert case.density > 0


def test_one_query_for_many_keys(documents):
    case = build(DECODE, documents)
    assert case.query.shape == (2, 1, 6, 5)
    assert case.key.shape == (2, 64, 3, 5)
    assert case.visible_pairs == 2 * 6 * 64
    everybody = [Implementation("tiled"), PEERS["jax.nn"], *YARDSTICKS.values()]
    assert statuses(DECODE, everybody, documents, ("forward",)) == {
        "tiled": ("ok", ""),
        "jax.nn": ("ok", ""),
        "naive": ("refused", "it has the additive score only"),
        "read": ("ok", ""),
    }


@needs_torch
def test_torch_with_shared_key_heads(documents):
    grouped = dataclasses.replace(SMALL, heads=6)
    for spec, way in ((DECODE, "forward"), (grouped, "both")):
        found = statuses(spec, [PEERS["torch"]], documents, (way,))
        assert found == {"torch": ("ok", "")}


@pytest.mark.slow
def test_the_naive_additive_score_passes(documents):
    spec = dataclasses.replace(SMALL, score="additive", heads=6)
    naive = YARDSTICKS["naive"]
    found = statuses(spec, [naive], documents, ("forward", "both"))
    assert found == {"naive": ("ok", "")}
    case = build(dataclasses.replace(spec, pattern="full", heads=3), documents)
    pairs, size, hidden = 2 * 3 * 37**2, 5, 64
    assert case.tanh_count(True) == 2 * pairs * hidden
    assert case.beside_tanh_flops(False) == pairs * 2 * size
    assert case.beside_tanh_flops(True) == pairs * (6 * size + 8 * hidden)


def test_who_is_not_there_is_refused_and_the_others_run(documents):
    everybody = [Implementation("absent"), Implementation("tiled")]
    assert statuses(SMALL, everybody, documents, ("forward",)) == {
        "absent": ("refused", "attnlab has no implementation of that name here"),
        "tiled": ("ok", ""),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "score"), in_turn(["causal", "documents"], ["scaled_dot", "bilinear"])
)
def test_the_reference_in_parts_is_the_reference(
    documents, pattern, score, monkeypatch
):
    spec = dataclasses.replace(SMALL, pattern=pattern, score=score)
    case = build(spec, documents)
    whole = gate.by_rows(case, backward=True)
    monkeypatch.setattr(gate, "HELD_BYTES", 2 * spec.dense_bytes // 4)
    parts = gate.by_rows(case, backward=True)
    assert parts.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_allclose(parts[name], array, rtol=1e-5, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_sees_what_the_mask_shows(documents, pattern):
    import torch

    spec = dataclasses.replace(SMALL, pattern=pattern, length=600)
    case = build(spec, documents)
    where = torch.arange(600)
    dense = case.mask.to_dense(600).reshape(-1, 600, 600)
    if pattern != "full":
        for b, wanted in enumerate(dense):
            seen = _rule(case)(b, 0, where[:, None], where)
            assert np.array_equal(seen.numpy(), wanted)


@needs_torch
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_flex_holds_no_pairs_of_a_rule(documents, monkeypatch):
    monkeypatch.setattr(contenders, "free_memory", lambda: 0)
    refusals = {
        pattern: PEERS["flex"].refusal(
            build(dataclasses.replace(SMALL, pattern=pattern), documents)
        )
        for pattern in ("window", "documents")
    }
    assert refusals["window"] is None
    assert refusals["documents"] is not None
    assert "GiB" in refusals["documents"]


@needs_torch
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", few(["window", "documents"], "documents"))
def test_flex_agrees_with_the_reference(documents, pattern):
    spec = dataclasses.replace(
        SMALL, pattern=pattern, length=150, heads=6, head_size=16
    )
    flex = PEERS["flex"]
    assert statuses(spec, [flex], documents, ("forward",)) == {"flex": ("ok", "")}
    assert statuses(spec, [flex], documents, ("both",)) == {
        "flex": ("refused", "FlexAttention has no backward pass on CPUs")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "pattern", few(["full", "causal", "causal_window", "documents"], "causal_window")
)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "zentorch"])
def test_runtimes_agree_with_the_reference(documents, name, pattern):
    spec = dataclasses.replace(SMALL, pattern=pattern, length=300, head_size=16)
    spec = dataclasses.replace(spec, heads=spec.key_heads)
    peer = PEERS[name]
    refusal = peer.refusal(build(spec, documents)) or ""
    if "not installed" in refusal or "AVX-512" in refusal:
        pytest.skip(refusal)
    assert statuses(spec, [peer], documents, ("forward",)) == {name: ("ok", "")}
    ((status, reason),) = statuses(spec, [peer], documents, ("both",)).values()
    assert status == "refused"
    assert "has no backward pass" in reason


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_groups_queries_of_causal_patterns(documents):
    pytest.importorskip("onnxruntime")
    grouped = dataclasses.replace(
        SMALL, pattern="causal", heads=6, key_heads=3, head_size=16
    )
    peer = PEERS["onnxruntime"]
    found = statuses(grouped, [peer], documents, ("forward",))
    assert found == {"onnxruntime": ("ok", "")}
    full = dataclasses.replace(grouped, pattern="full")
    assert "grouped" in (peer.refusal(build(full, documents)) or "")
    bf16 = dataclasses.replace(grouped, dtype="bfloat16")
    assert "float32" in (peer.refusal(build(bf16, documents)) or "")


LINES = (
    Problem("one", "few", SMALL, "forward", ()),
    Problem("two", "few", SMALL, "both", ()),
)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs the script on two lines, untimed; returns what it measured and wrote."""
    monkeypatch.setattr(peers, "PROBLEMS", LINES)
    monkeypatch.setattr(peers, "OVERHEADS", {"call": (lambda quick: {"x": 1.5}, "us")})
    monkeypatch.setattr(peers, "load_documents", list)

    def start(*arguments, stop=()):
        measured = []

        def measure(problem, *_):
            if problem.name in stop:
                raise KeyboardInterrupt
            measured.append(problem.name)
            timing = {"median": 0.5, "low": 0.25, "high": 1.0, "repeats": 3}
            row = {"contender": "tiled", "status": "ok", "reason": "", "error": 0.5}
            rows = [{**row, "timing": timing}]
            return {**peers.identity(problem), "group": problem.group, "rows": rows}

        monkeypatch.setattr(peers, "measure", measure)
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), *arguments])
        with contextlib.suppress(SystemExit):
            peers.main()
        lines = json.loads((tmp_path / f"{peers.file_name()}.json").read_text())[
            "lines"
        ]
        return measured, [line["name"] for line in lines]

    return start


def test_interrupted_before_anything_was_measured(script, capsys, tmp_path):
    with pytest.raises(FileNotFoundError):  # there is no file to read
        script(stop={"one"})
    assert capsys.readouterr().out.strip() == "interrupted: nothing was measured"
    assert not list(tmp_path.iterdir())


def test_interrupted_and_resumed(script, capsys):
    everything = ["one", "two", "call"]
    assert script(stop={"two"}) == (["one"], ["one"])
    assert "interrupted" in capsys.readouterr().out
    assert script("--resume") == (["two"], everything)
    assert script("--resume") == ([], everything)
    assert script("--only", "two") == (["two"], everything)
    assert script("--only", "few", "--resume") == ([], everything)
    assert script() == (["one", "two"], everything)
    assert "| one | 500 |" in capsys.readouterr().out


def test_results_of_other_lines_are_measured_again(script, monkeypatch):
    script()
    other = LINES[0]._replace(spec=dataclasses.replace(SMALL, length=38))
    monkeypatch.setattr(peers, "PROBLEMS", (other, LINES[1]))
    assert script("--resume") == (["one"], ["one", "two", "call"])
    monkeypatch.setattr(peers, "versions", lambda: {"jax": "another"})
    assert script("--resume")[0] == ["one", "two"]


@pytest.mark.slow
def test_a_measured_line_is_plain_json(documents, monkeypatch):
    class Line(Problem):
        @property
        def contenders(self):
            return Wrong(_shifted), Implementation("tiled"), Implementation("absent")

    monkeypatch.setattr(peers, "measure_read_rate", lambda: 1e10)
    line = Line("line", "group", SMALL, "forward", ("read",))
    record = peers.measure(line, documents, ONCE, lambda doing: None, peaks_size=64)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [r["status"] for r in record["rows"]] == ["failed", "ok", "refused"]
    tiled = record["rows"][1]
    held = 4 * 2 * SMALL.batch * SMALL.length * SMALL.key_heads * SMALL.head_size
    rate = held / tiled["timing"]["median"] / 1e10
    assert tiled["of_read_rate"] == pytest.approx(rate)
    assert peers.times(record).keys() == {"tiled"}
    assert peers.table([record]).row_count == 3


def test_ratios_for_the_readme():
    def line(name, **medians):
        rows = [
            {"contender": n, "status": "ok", "timing": {"median": m}}
            for n, m in medians.items()
        ]
        return {"name": name, "rows": rows}

    text = peers.markdown([
        line("a", native=0.02, tiled=0.03, torch=0.05),
        line("b", tiled=0.25, torch=0.2),
        {"name": "c", "values": {"x": 1.0}},
    ])
    assert text.splitlines() == [
        "| problem | `native` | `tiled` | `torch` |",
        "| --- | --- | --- | --- |",
        "| a | 20.0 | 30.0 (1.50x) | 50.0 (2.50x) |",
        "| b | - | 250 | 200 (0.80x) |",
    ]


@pytest.mark.slow
@needs_torch
@pytest.mark.usefixtures("loose")  # for optax
def test_the_training_step_is_the_same_mathematics():
    sizes = training_step.Sizes(2, 40, 2, 16, 2, 31)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 41))
    ours, theirs = (
        [float(step()) for _ in training_step.ALLOWED]
        for step in (
            training_step.attnlab_step(sizes, tokens, "tiled"),
            training_step.torch_step(sizes, tokens, compiled=False),
        )
    )
    assert training_step.disagreement(theirs, ours) is None
    assert ours[2] < ours[0]
    told = training_step.disagreement([ours[0], ours[1] + 0.1, ours[2]], ours)
    assert told is not None
    assert "after 1 updates" in told
    first, second = training_step.parameter_counts(sizes)
    assert first == second


def test_the_command_does_not_say_where_results_went():
    given = ["--only", "a b", "--out", "/some/where", "--quick", "--out=/else"]
    made = common.command("peers", given)
    assert made == "python -m benchmarks.peers --only 'a b' --quick"
