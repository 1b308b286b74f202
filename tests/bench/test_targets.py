"""Programs for TPUs, compiled by the TPU's own compiler without a TPU."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from attnlab import attention, masks, scores
from attnlab._src.bench import (
    cli,
    per_block,
    problem,
    static,
    static_cli,
    targets,
    tune,
)
from attnlab._src.bench.cases import SCORES, Spec
from attnlab._src.bench.deviceless import schedules, vector_memory
from attnlab._src.bench.targets import TARGETS, Kernel, Study, study
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from benchmarks import tpu, tpu_baseline
from tests.implementations import interpreted

needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the TPU compiler is not installed"
)

SMALL = Spec(dtype="bfloat16", length=1024, heads=2, key_heads=2, head_size=64)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_any_function_compiles(target, cache, monkeypatch):
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    found = study(lambda a, b: jnp.tanh(a @ b), x, x, target=target, cache=cache)
    assert found.kernels
    assert found.arguments == 2 * 256 * 256 * 2
    assert all(k.bundles > 0 for k in found.kernels)
    if target == "tpu:v4":
        assert found.why is not None
        assert "no cycles" in found.why
    else:
        assert found.cycles is not None
        assert found.cycles > 0
    # The second call reads the cache and does not compile.
    monkeypatch.setattr(targets, "_compile", None)
    again = study(lambda a, b: jnp.tanh(a @ b), x, x, target=target, cache=cache)
    assert again == found


def of_pytrees(arrays, score, nothing):
    query = score.project_query(arrays["x"])
    return {"y": query @ arrays["w"], "score": score, "nothing": nothing}


PYTREES = (
    {
        "x": jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32),
        "w": jax.ShapeDtypeStruct((4, 128), jnp.float32),
    },
    jax.eval_shape(lambda: scores.additive.init(jax.random.key(0), 16, hidden_size=4)),
    None,
)


def test_pytrees_reach_the_compiler_as_leaves():
    """The exported program takes and returns leaves: see ``deviceless.main``."""
    program = targets.lowered(of_pytrees, PYTREES, "tpu:v5e")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals]
    assert len(shapes) == len(jax.tree.leaves(PYTREES))
    results = jax.eval_shape(program.call, *shapes)
    wanted = jax.tree.leaves(jax.eval_shape(of_pytrees, *PYTREES))
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in wanted]


@pytest.mark.slow
@needs_compiler
def test_functions_of_pytrees_compile(cache):
    found = study(of_pytrees, *PYTREES, target="tpu:v5e", cache=cache)
    assert found.kernels
    assert found.why is None


def figures():
    held, ours = tpu_baseline.held(), tpu_baseline.compilers()
    if ours not in held:
        pytest.skip(f"no figures of {ours}: benchmarks.tpu_baseline --write makes them")
    return held[ours]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_as_well_as_they_did(target, cache):
    before, which = figures()[target], [*TARGETS].index(target)
    # Each kernel for two targets; ``benchmarks.tpu_baseline`` compiles each for all.
    for i, name in enumerate(tpu_baseline.KERNELS):
        if (i - which) % len(TARGETS) > 1:
            continue
        now = tpu_baseline.numbers(tpu_baseline.compiled(name, target, cache))
        assert now.keys() == before[name].keys()
        for _, old, new in tpu_baseline.differences(before[name], now):
            assert not tpu_baseline.worse(old, new), (name, before[name], now)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("head_size", "target"),
    [
        (64, "tpu:v4"),
        (80, "tpu:tpu7x"),
        (96, "tpu:v4"),
        (128, "tpu:tpu7x"),
        (192, "tpu:v4"),
        (256, "tpu:v4"),
        (256, "tpu:tpu7x"),
    ],
)
def test_every_head_size_compiles(head_size, target, cache):
    """Both passes compile, for the least memory (v4) and the newest TPU (tpu7x)."""
    shapes = [
        jax.ShapeDtypeStruct((1, 300, heads, size), jnp.float32)
        for heads, size in ((2, head_size), (1, head_size), (1, 64))
    ]

    def loss(q, k, v):
        return attention(
            q, k, v, mask=masks.causal(), implementation="pallas_tpu"
        ).sum()

    found = study(jax.grad(loss, (0, 1, 2)), *shapes, target=target, cache=cache)
    assert found.kernel("attnlab_forward")
    assert found.kernel("attnlab_backward")


@pytest.mark.slow
@needs_compiler
def test_a_slower_kernel_is_noticed(cache, monkeypatch):
    """The kernel takes more cycles with small blocks."""
    name, target = "forward full", "tpu:v5e"
    before = figures()[target][name]
    monkeypatch.setattr(tpu_baseline, "BLOCKS", Blocks(128, 128, 128))
    now = tpu_baseline.numbers(tpu_baseline.compiled(name, target, cache))
    kernel = "attnlab_forward_bounded"
    assert tpu_baseline.worse(before[kernel]["cycles"], now[kernel]["cycles"])


def test_what_counts_as_worse():
    assert not tpu_baseline.worse(100, 103)
    assert tpu_baseline.worse(100, 104)
    assert not tpu_baseline.worse(100, 50)
    assert tpu_baseline.worse(100, None)
    assert not tpu_baseline.worse(None, 5)
    found = list(tpu_baseline.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}))
    assert found == [("a: b", 1, 3), ("a: c", 2, None)]


def test_each_version_of_the_compilers_has_its_figures(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"old": {"tpu:v4": {}, "tpu:v5e": {}}}))
    monkeypatch.setattr(tpu_baseline, "FILE", file)
    monkeypatch.setattr(tpu_baseline, "compiled", lambda *_: Study("tpu:v5e"))
    monkeypatch.setattr(tpu_baseline, "compilers", lambda: "new")

    def foreign(*arguments):
        tpu_baseline.main([*arguments])
        return "no figures of new" in " ".join(capsys.readouterr().out.split())

    assert foreign("--target", "tpu:v5e")
    assert foreign("--write", "--target", "tpu:v5e", "tpu:v6e")
    content = json.loads(file.read_text())
    assert list(content) == ["old", "new"]
    assert content["old"].keys() == {"tpu:v4", "tpu:v5e"}
    assert content["new"].keys() == {"tpu:v5e", "tpu:v6e"}
    assert not foreign()


def test_the_baseline_has_figures_of_every_target():
    for figures in tpu_baseline.held().values():
        assert figures.keys() == {*TARGETS}


@pytest.mark.slow
@needs_compiler
def test_too_much_memory_is_a_reason_and_no_crash(cache):
    def large(x):
        all_pairs = x[:, None] * x[None, :]
        return all_pairs @ all_pairs

    shape = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    found = study(large, shape, target="tpu:v5e", cache=cache)
    assert found.cycles is None
    assert found.why


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("number", [9, 15])
def test_whom_the_system_stopped_is_asked_again(number, tmp_path, monkeypatch):
    """A killed compiler is run again without the profile; that result is not cached."""
    killed = [sys.executable, "-c", f"import signal; signal.raise_signal({number})"]
    before, asked = subprocess.run, []

    def run(command, *, env, **options):
        asked.append("profile" in env["LIBTPU_INIT_ARGS"])
        return before(killed if asked[-1] else command, env=env, **options)

    monkeypatch.setattr(targets.subprocess, "run", run)
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    found = study(jnp.sin, shape, target="tpu:v5e", cache=tmp_path)
    assert asked == [True, False]
    assert found.kernels
    assert found.why == "no cycles: the compiler was killed"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_compiler
def test_an_interrupted_compiler_gave_no_answer(tmp_path, monkeypatch):
    """Otherwise "no cycles" would be cached as its result."""
    # Shells start background jobs with SIGINT ignored: restore its default.
    interrupt = "import signal as s; s.signal(s.SIGINT, s.SIG_DFL); s.raise_signal(2)"
    stopped = [sys.executable, "-c", interrupt]
    before = subprocess.run
    run = lambda command, **options: before(stopped, **options)
    monkeypatch.setattr(targets.subprocess, "run", run)
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(KeyboardInterrupt):
        study(jnp.sin, shape, target="tpu:v5e", cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(targets.CompilerMissing, match=r"attnlab\[tpu-aot\]"):
        study(jnp.sin, shape, target="tpu:v5e")
    with pytest.raises(ValueError, match="target: expected one of tpu:v4, "):
        study(jnp.sin, shape, target="tpu:v99")


@pytest.mark.parametrize("command", ["static", "tune", "tpu", "tpu_baseline"])
def test_commands_say_what_is_missing(command, monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise targets.CompilerMissing('pip install "attnlab[tpu-aot]"')

    for module in (per_block, tpu_baseline):
        monkeypatch.setattr(module, "study", refuse)
    table = tmp_path / "table.json"
    monkeypatch.setattr("sys.argv", ["tpu", "--quick", "--out", str(tmp_path)])
    code = {
        "static": lambda: cli.main(["static", "--out", str(tmp_path)]),
        "tune": lambda: cli.main(["tune", "--target=tpu:v5e", "--out", str(table)]),
        "tpu": tpu.main,
        "tpu_baseline": lambda: sys.exit(tpu_baseline.main([])),
    }[command]
    with pytest.raises(SystemExit) as ended:
        code()
    said = capsys.readouterr()
    assert "attnlab[tpu-aot]" in f"{ended.value.code} {said.out} {said.err}"
    assert ended.value.code != 0
    assert not list(tmp_path.iterdir())


def test_a_schedule_is_read(tmp_path):
    table = "== CAPACITY:\nMXU, VLOAD:FILL, VSTORE:SPILL\n 2 3 2\n== UTILIZATION:\n"
    name = "123-attnlab_forward.1-01-final_hlo-static-per-bundle-utilization.txt"
    (tmp_path / name).write_text(table + "2 0 1\n1 1 0\n1 0 1\n\n")
    ((found, schedule),) = schedules(tmp_path)
    assert found == "attnlab_forward.1"
    assert schedule == {
        "bundles": 3,
        "slots": {
            "MXU": round(4 / 6, 4),
            "VLOAD:FILL": round(1 / 9, 4),
            "VSTORE:SPILL": round(2 / 6, 4),
        },
        "fills": 1,
        "spills": 2,
    }
    line = (
        '  %a.1 = f32[8] custom-call(%b), backend_config={"used_scoped_memory_configs":'
        '[{"memory_space":"1","offset":"0","size":"77"}]}'
    )
    assert vector_memory(line) == {"a.1": 77}


def told(cycles_of):
    """A fake ``study``: kernel ``name`` takes ``cycles_of[name](n)`` cycles.

    ``n * n`` is the number of query-key pairs.
    """

    def answer(fn, *shapes, target, cache=None):
        with targets.on(target):
            jax.eval_shape(fn, *shapes)
        length = math.sqrt(shapes[0].shape[1] * shapes[1].shape[1])
        kernels = tuple(
            Kernel(f"{name}.1", cycles(length), 100, 10, {}, 0, 5)
            for name, cycles in cycles_of.items()
        )
        return Study(target, kernels)

    return answer


def test_cycles_follow_the_plan(monkeypatch):
    """Cycles are those of a block (from three problems) times the number of blocks."""
    blocks = Blocks(128, 128, 128)

    def cycles(length):
        return 1000 + 7 * (length / 128) ** 2

    names = ("attnlab_forward_bounded", "splash_mha_fwd")
    monkeypatch.setattr(per_block, "study", told(dict.fromkeys(names, cycles)))
    spec = Spec(pattern="causal", dtype="bfloat16", length=1024, head_size=64)
    row = static.row(spec, "forward", "tpu:v5e", blocks=blocks)
    live = masks.causal().plan(1024, block_size=128).rows
    full, partial = (8 * int(x.per_row().sum()) for x in live)
    assert (row.full, row.partial, row.total) == (full, partial, 8 * 64)
    assert row.block_cycles == pytest.approx((7, 7))
    assert row.cycles == pytest.approx(7 * (full + partial))
    assert row.ratio_to_splash == pytest.approx(1)
    assert row.bounds["matrix units"] == pytest.approx(
        2 * (full + partial) * 128 * 128 * 64 / 65_536
    )
    assert "pallas_tpu_128x128x128" not in IMPLEMENTATIONS


def test_a_command_writes_its_rows(monkeypatch, tmp_path, capsys):
    names = ("attnlab_forward_bounded", "splash_mha_fwd")
    monkeypatch.setattr(per_block, "study", told(dict.fromkeys(names, lambda n: n * n)))
    out = tmp_path / "out"
    own = "causal() & (sliding_window(300, 0) | prefix(4))"
    arguments = ["--shape", "b=1,t=2048,n=2,h=64", "--mask", "full", own]
    code = cli.main(["static", *arguments, "--target", "tpu:v6e", "--out", str(out)])
    assert code == 0
    content = json.loads((out / "static.json").read_text())
    rows = content["rows"]
    assert [r["spec"]["pattern"] for r in rows] == ["full", own]
    assert rows[1]["cycles"] < rows[0]["cycles"]
    assert rows[1]["ratio_to_splash"] is None
    assert all(r["target"] == "tpu:v6e" and r["cycles"] > 0 for r in rows)
    assert content["command"].startswith("attnlab static ")
    assert cli.main(["report", str(out / "static.json"), "--out", str(out)]) == 0
    text = (out / "report.html").read_text()
    assert "tpu:v6e, forward, full" in text
    assert text.count("<svg ") == 1
    assert "for ratios, not times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "t=0"], "expected letters of b,t,s,n,k,h with sizes"),
        (["--shape", "n=3,k=2"], "k=2 does not divide n=3"),
        (["--blocks", "100x128x128"], "must be multiples of 128"),
        (["--blocks", "128x0x128"], "must be multiples of 128"),
        (["--blocks", "128x128"], "expected queries x keys x keys at once"),
        (["--target", "tpu:v9"], "invalid choice"),
        (["--mask", "windows"], "expected one of full, causal, window, "),
        (["--mask", "causal() & 3"], "'causal() & 3': expected a call of anchor"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["static", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_problem_that_has_no_answer_costs_no_other(monkeypatch, tmp_path, capsys):
    names = ("attnlab_forward_bounded", "splash_mha_fwd")
    monkeypatch.setattr(per_block, "study", told(dict.fromkeys(names, lambda n: n * n)))
    short = "random_blocks(0, 1, 64, 4)"
    arguments = ["static", "--shape", "t=512,s=1024", "--mask", short, "full"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "built for 4 blocks" in " ".join(capsys.readouterr().err.split())
    full, refused = json.loads((tmp_path / "static.json").read_text())["rows"]
    assert full["cycles"] > 0
    assert refused["spec"]["pattern"] == short
    assert "built for 4 blocks" in refused["why"]
    assert cli.main([*arguments[:-1], "--out", str(tmp_path)]) == 1


def test_shapes_have_defaults():
    assert static_cli.shape("t=8") == {
        "query_length": 8,
        "length": 8,
        "heads": 1,
        "key_heads": 1,
        "head_size": 128,
    }


def test_costs_of_blocks_become_a_table(monkeypatch, tmp_path, capsys):
    out = tmp_path / "table.json"
    before = {"64": {"forward": [[128, 128, 128, 1, 1, 1]]}}
    out.write_text(json.dumps({"v6e": before, "v5e": {}}))

    def cost(spec, of, target, blocks, masked):
        """Half as much a pair in blocks of 512 x 512, all keys at once are best."""
        if spec.head_size == 256 and of == "backward" or blocks.q == 256:
            return None
        each = 1 if blocks[:2] == (512, 512) else 2
        return blocks.q * blocks.k * (each + masked) - blocks.chunk / 1e3, blocks.q

    monkeypatch.setattr(tune, "by_cycles", cost)
    command = ["tune", "--target", "tpu:v5e", "--out", str(out), "--head-size"]
    assert cli.main([*command, "64"]) == 0
    content = json.loads(out.read_text())
    assert content["v6e"] == before
    found = content["v5e"]["64"]
    assert found["backward"][0] == [512, 512, 512, 512.0, 2.6214e5, 5.2429e5]
    assert found["forward"][0][:3] == [512, 512, 256]
    assert len(found["forward"]) == len(tune.SIDES) - 2
    sizes = sorted(x[:3] for x in found["backward"])
    assert sizes[-1] == [1024, 1024, 1024]
    assert sizes[0] == [512, 256, 256]
    assert "512x512x512" in capsys.readouterr().out

    def stopped(spec, *rest):
        if spec.head_size == 128:
            raise KeyboardInterrupt
        return cost(spec, *rest)

    # An interrupted search keeps its results and those of the file.
    own = [[128, 128, 128, 1, 1, 1]]
    content = {"v5e": {"256": {"forward": own, "backward": own}}}
    out.write_text(json.dumps(content))
    monkeypatch.setattr(tune, "by_cycles", stopped)
    assert cli.main([*command, "256", "128"]) == 130
    assert "table.json keeps what is known" in capsys.readouterr().err.replace("\n", "")
    assert cli.main([*command, "128"]) == 130
    assert "interrupted: nothing is known" in capsys.readouterr().err
    content["v5e"]["256"]["forward"] = found["forward"]
    assert json.loads(out.read_text()) == content


def test_sizes_are_measured_beside_each_other():
    both = threading.Barrier(2)

    def measure(blocks, masked):
        if not masked and blocks.k == 512:
            both.wait(timeout=60)
        return 1.0, 0.0

    sides = [(256, 512), (512, 512)]
    found = list(tune.costs(measure, sides, "forward", at_once=2))
    assert [x and x.blocks for x in found] == [(256, 512, 256), (512, 512, 256)]


@pytest.mark.parametrize("of", ["forward", "backward"])
def test_costs_come_from_differences(of):
    """A constant cancels; an outer block costs 7, a live block 3."""
    blocks = Blocks(256, 512, 256)

    def measure(queries, keys):
        rows, cols = queries // 256, keys // 512
        return 100 + 7 * (rows if of == "forward" else cols) + 3 * rows * cols

    assert per_block.slopes(blocks, of, measure) == (3, 7)
    assert per_block.slopes(blocks, of, lambda *_: None) == (None, None)


def test_tuning_here_needs_a_tpu(tmp_path, capsys):
    assert cli.main(["tune", "--out", str(tmp_path / "table.json")]) == 1
    assert "expected a TPU, found cpu" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "broken.json"], "broken.json is no table of blocks"),
        (["--out", "file/table.json"], "expected a folder that can be written to"),
        (["--head-size", "0", "--out", "new.json"], "a whole number of at least 1"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_bad_options_of_the_tuner(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "broken.json").write_text("[1]")
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", "--target", "tpu:v5e", *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "broken.json").read_text() == "[1]"


@pytest.mark.parametrize("of", ["forward", "backward"])
def test_time_is_taken_of_the_sizes_asked_for(of, monkeypatch):
    made = interpreted.Interpreted()
    interpreted.register(monkeypatch, made)
    asked = []

    @contextlib.contextmanager
    def sized(blocks):
        asked.append(blocks)
        yield made

    monkeypatch.setattr(problem, "sized", sized)
    spec = Spec(heads=1, key_heads=1, head_size=8)
    monkeypatch.setattr(
        per_block, "slopes", lambda blocks, of, measure, length: (measure(64, 128), 0.0)
    )
    for masked in (False, True):
        time = tune.by_time(spec, of, Blocks(32, 64, 32), masked)
        assert time is not None
        assert time[0] > 0
    assert set(asked) == {Blocks(32, 64, 32)}


def test_sizes_that_cannot_fit_have_no_time(monkeypatch):
    """By attnlab's own estimate, before anything is compiled."""
    made = interpreted.Interpreted()
    interpreted.register(monkeypatch, made)
    monkeypatch.setattr(problem, "sized", lambda _: contextlib.nullcontext(made))
    spec = Spec(heads=1, key_heads=1, head_size=2**14)
    assert tune.by_time(spec, "forward", Blocks(32, 64, 32), False) is None


@pytest.mark.parametrize("score", SCORES)
def test_products_that_a_pass_cannot_do_without(score):
    """Products with values, and those of logits if they are inner products."""
    spec = Spec(dtype="bfloat16", score=score)
    logits = score not in ("additive", "concat", "mlp")
    one = 2**20 * spec.head_size / TARGETS["tpu:v5e"].multiplies
    for of, products in ("forward", 1 + logits), ("backward", 2 + 3 * logits):
        found = static.least(spec, of, "tpu:v5e", 2**20, 0)
        assert found["matrix units"] == products * one


def test_short_sides_are_counted_in_the_blocks_that_they_get(monkeypatch):
    names = ("attnlab_forward_bounded", "splash_mha_fwd")
    monkeypatch.setattr(per_block, "study", told(dict.fromkeys(names, lambda n: n * n)))
    spec = Spec(dtype="bfloat16", length=200, heads=1, key_heads=1, head_size=64)
    row = static.row(spec, "forward", "tpu:v5e", blocks=Blocks(1024, 1024, 512))
    assert row.blocks == (256, 256, 256)
    assert row.full + row.partial == 1
    assert row.bounds["function unit"] == 256 * 256 / 1024


@pytest.mark.parametrize("of", ["forward", "backward"])
def test_blocks_need_not_be_square(of, monkeypatch):
    """Cycles per pair, 3 of attnlab and 4 of splash, do not depend on the blocks."""
    ours, splash = {
        "forward": ("attnlab_forward_bounded", "splash_mha_fwd"),
        "backward": ("attnlab_backward", "splash_mha_dq"),
    }[of]
    costs = {ours: lambda n: 50 + 3 * n * n, splash: lambda n: 90 + 4 * n * n}
    monkeypatch.setattr(per_block, "study", told(costs))
    spec = Spec(dtype="bfloat16", head_size=64)
    for blocks in (Blocks(512, 1024, 256), Blocks(256, 128, 128)):
        pairs = blocks.q * blocks.k
        found = per_block.per_block(spec, blocks, of, "tpu:v5e", masked=False)
        assert found.cycles == pytest.approx(3 * pairs)
        for sizes, fused in per_block.splash_ways(blocks, of):
            found = per_block.splash_per_block(
                spec, sizes, of, "tpu:v5e", masked=False, fused=fused
            )
            assert found.cycles == pytest.approx(4 * pairs)
        packed = dataclasses.replace(spec, pattern="documents")
        found = per_block.per_block(packed, blocks, of, "tpu:v5e", masked=True)
        assert found.cycles == pytest.approx(3 * pairs)


@pytest.mark.slow
@needs_compiler
def test_blocks_with_a_mask_have_cycles_on_every_target():
    """Dead slots are not searched for a block: some compilers refuse to time that."""
    spec = Spec("causal_window", dtype="bfloat16", head_size=64, heads=1, key_heads=1)
    for target in ("tpu:v5e", "tpu:v6e"):
        found = static.row(spec, "forward", target, blocks=Blocks(256, 256, 256))
        assert found.cycles, found.why


@pytest.mark.slow
def test_each_kernel_is_shown_at_its_best_blocks(monkeypatch, tmp_path, capsys):
    """Cycles by mask: a window has smaller blocks than full attention."""
    each = {(1024, 1024): (5, 1.0), (256, 256): (1, 0.1)}

    def ours(spec, of, target, blocks, masked):
        if blocks[:2] not in each or blocks.chunk != 256:
            return None
        outer, block = each[blocks[:2]]
        return block, outer

    def peer(spec, of, target, fused, blocks, masked):
        found = ours(spec, of, target, blocks, masked)
        return found and tuple(4 * x for x in found)

    monkeypatch.setattr(tpu, "by_cycles", ours)
    monkeypatch.setattr(tpu, "by_splash", peer)
    names = {"attnlab_forward_bounded": lambda n: 2 * n * n}
    names["attnlab_backward"] = names["attnlab_forward_bounded"]
    monkeypatch.setattr(per_block, "study", told(names))
    out = ["--out", str(tmp_path)]
    options = ["tpu", "--target", "tpu:v6e", "--head-size", "64", *out]
    monkeypatch.setattr("sys.argv", options)
    tpu.main()
    content = json.loads((tmp_path / "tpu.json").read_text())
    assert [row["pass"] for row in content["inner"]] == ["forward", "backward"]
    for row in content["inner"]:
        found = {(x["mask"], x["length"]): x for x in row["masks"]}
        full, window = found["full", 4096], found["window", 4096]
        assert (full["blocks"], full["cycles"]) == ([1024, 1024, 256], 4 * 5 + 16)
        assert window["blocks"] == [256, 256, 256]
        assert window["cycles"] == pytest.approx(16 + 0.1 * 46)
        for x in found.values():
            assert x["ratio_to_splash"] == pytest.approx(0.25)
    pairs = 2 * 1024  # additive scores: 2 cycles per pair over 1/1024 per function call
    assert [row["over_bound"] for row in content["additive"]] == [
        pytest.approx(pairs / (1 + 64))
    ] * 2
    assert "0.25x splash" in capsys.readouterr().out
