"""A run that was killed or interrupted gives the same numbers after resuming."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.studies.machinery.checkpoints import Checkpoint, Checkpoints
from benchmarks.studies.machinery.errors import Interrupted, StudyError
from benchmarks.studies.machinery.training import train
from tests.grid import few
from tests.studies.tiny import EVERY, STEPS, TASK, make_run

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("seconds", "compile_seconds", "tokens_per_second", "date")


def curve(log):
    """The log without times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in log]


def read(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder):
    return Checkpoints(folder / "checkpoints").steps()


@pytest.mark.slow
def test_killed_and_resumed_bit_for_bit(tmp_path):
    flags = os.environ["XLA_FLAGS"]
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    command = [sys.executable, "-m", "tests.studies.tiny", str(tmp_path)]

    def start(*more):
        return subprocess.run(
            [*command, *more],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )

    first = start()
    assert first.returncode == -signal.SIGKILL, first.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert read(killed)[-1]["step"] == 17
    assert not (killed / "summary.json").exists()
    # An incomplete line, as after a power failure.
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 18, "lo')
    second = start("--resume")
    assert second.returncode == 0, second.stderr
    assert curve(read(killed)) == curve(read(whole))
    evaluated = [line["step"] for line in read(whole) if "evaluation" in line]
    assert evaluated == [0, 5, 10, 15, 20, 23]
    one, other = (json.loads((f / "summary.json").read_text()) for f in (whole, killed))
    for name in ("best", "last", "tokens", "steps", "parameters"):
        assert one[name] == other[name]
    assert one["last"]["loss"] < evaluation(read(whole), 0)


def evaluation(log, step):
    (found,) = (
        x["evaluation"]["loss"] for x in log if "evaluation" in x and x["step"] == step
    )
    return found


@pytest.fixture
def whole(mesh, place, tmp_path):
    """A run that was not interrupted."""
    return train(make_run(mesh=mesh), place._replace(folder=tmp_path / "whole"))


def stopped(mesh, place, step=12):
    """A run that was interrupted at ``step``."""

    def batch_at(number):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return TASK.batch_at(number)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"step {step + 1} of .*--resume") as caught:
        train(make_run(mesh=mesh, batch_at=batch_at), place)
    assert caught.value.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_stopped_between_evaluations(mesh, place, whole):
    stopped(mesh, place)
    assert steps_of(place.folder)[-1] == 13
    found = train(make_run(mesh=mesh), place._replace(resume=True))
    assert curve(found.log) == curve(whole.log)
    assert found.summary["best"] == whole.summary["best"]


@pytest.mark.slow
def test_stopped_in_the_last_step(mesh, place, whole):
    stopped(mesh, place, step=STEPS - 1)
    found = train(make_run(mesh=mesh), place._replace(resume=True))
    assert curve(found.log) == curve(whole.log)


def test_damaged_ones_do_not_push_good_ones_out(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {"x": np.arange(5.0)}
    for step in (1, 2, 3, 4):
        checkpoints.save(Checkpoint(state, {"step": step}), best=1)
    assert checkpoints.steps() == [1, 3, 4]
    for step in (3, 4):
        (tmp_path / str(step) / "files.json").unlink()
    with pytest.warns(UserWarning, match="was not written to the end"):
        assert checkpoints.newest(state).record == {"step": 1}
    checkpoints.save(Checkpoint(state, {"step": 2}), best=1)
    assert checkpoints.steps() == [1, 2, 3, 4]
    with pytest.warns(UserWarning, match="was not written to the end"):
        found = checkpoints.newest(state)
    assert found.record == {"step": 2}
    np.testing.assert_array_equal(found.state["x"], state["x"])


@pytest.mark.parametrize(
    "damage", few(["truncated", "flipped", "gone", "record"], "flipped")
)
def test_a_damaged_checkpoint_falls_back(mesh, place, whole, damage):
    stopped(mesh, place)
    newest = place.folder / "checkpoints" / "13"
    for path in newest.glob("state/**/d/*"):
        content = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(content[:100])
        elif damage == "flipped":
            content[len(content) // 2] ^= 16
            path.write_bytes(content)
        elif damage == "gone":
            path.unlink()
    if damage == "record":
        (newest / "record" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match=r"checkpoints/13 is damaged"):
        found = train(make_run(mesh=mesh), place._replace(resume=True))
    assert curve(found.log) == curve(whole.log)


@pytest.mark.slow
def test_without_any_good_checkpoint_it_begins_anew(mesh, place, whole):
    stopped(mesh, place)
    for path in (place.folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        found = train(make_run(mesh=mesh), place._replace(resume=True))
    assert curve(found.log) == curve(whole.log)


def test_the_best_and_the_last_are_kept(mesh, place):
    losses = iter([5.0, 2.0, 4.0, 3.0, 6.0, 7.0])
    run = make_run(mesh=mesh, evaluate=lambda model: {"loss": next(losses)})
    found = train(run, place)
    assert found.summary["best"] == {"step": EVERY, "loss": 2.0}
    assert found.summary["last"] == {"step": STEPS, "loss": 7.0}
    assert steps_of(place.folder) == [EVERY, 20, STEPS]


def test_the_model_is_the_best_one(mesh, place):
    seen = []

    def evaluate(model):
        seen.append(np.array(model.out.kernel[...]))
        assert model.dropout.deterministic
        return {"right": [0.5, 0.25, 0.75, 0.5, 0.625, 0.5][len(seen) - 1]}

    found = train(
        make_run(mesh=mesh, evaluate=evaluate, best="right", higher_is_better=True),
        place,
    )
    assert found.summary["best"] == {"step": 2 * EVERY, "right": 0.75}
    np.testing.assert_array_equal(found.model.out.kernel[...], seen[2])
    assert found.model.dropout.deterministic


def test_a_best_one_that_is_lost_is_told(mesh, place, whole):
    folder = place.folder.parent / "whole"
    best = folder / "checkpoints" / str(whole.summary["best"]["step"])
    (best / "record" / "metadata").unlink()
    with pytest.raises(StudyError, match="best checkpoint cannot be read.*--only tiny"):
        train(make_run(mesh=mesh), place._replace(folder=folder, resume=True))


def test_a_finished_run_is_read(mesh, place, whole):
    def forbidden(step):
        raise AssertionError("nothing was to be trained")

    again = place._replace(folder=place.folder.parent / "whole", resume=True)
    found = train(make_run(mesh=mesh, batch_at=forbidden), again)
    assert found.summary == whole.summary
    assert curve(found.log) == curve(whole.log)
    np.testing.assert_array_equal(
        found.model.out.kernel[...], whole.model.out.kernel[...]
    )


def test_another_config_is_refused_or_begun_anew(mesh, place):
    stopped(mesh, place)
    other = make_run(mesh=mesh, config={"features": 13, "rate": 0.07})
    with pytest.raises(StudyError, match=r"config.rate was 0.05, is 0.07.*--resume"):
        train(other, place._replace(resume=True))
    assert steps_of(place.folder)[-1] == 13
    assert train(other, place).summary["config"]["rate"] == 0.07
