"""Runs in the ledger need not be trained again."""

import functools
import json
import shutil
import threading

import pytest
from filelock import FileLock

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.errors import StudyError
from tests.studies.tiny import make_run


def measured(model, log):
    return {"features": model.out.in_features, "lines": len(log)}


def forbidden(step):
    raise AssertionError("nothing was to be trained")


@pytest.fixture
def context(tmp_path, mesh, place):
    return Context("some", tmp_path, mesh, place.console)


def run(mesh, name="tiny", **changes):
    return make_run(name, mesh=mesh, **{"measure": measured, **changes})


def resumed(context, **changes):
    return Context("some", context.out, context.mesh, context.console, **changes)


def test_what_was_measured_is_kept_without_the_models(context, mesh):
    first = context.train(run(mesh))
    assert first.summary["measured"]["features"] == 13
    assert first.summary["measured"]["lines"] > 23
    shutil.rmtree(context.out / "runs")
    again = resumed(context, resume=True)
    assert again.train(run(mesh, batch_at=forbidden)).summary == first.summary
    assert again.best == context.best == {"tiny": first.summary["best"]}
    assert again.seen == ["tiny"]
    # The run is left out by --only, but is in the ledger.
    left_out = resumed(context, only=["other"])
    assert left_out.train(run(mesh, batch_at=forbidden)).summary == first.summary
    assert left_out.train(run(mesh, "third", batch_at=forbidden)) is None


@pytest.mark.slow
def test_a_run_is_trained_anew_where_nobody_resumes(context, mesh):
    for name, rate in (("tiny", 0.05), ("more", 0.05), ("tiny", 0.07)):
        context.train(run(mesh, name, config={"features": 13, "rate": rate}))
    lines = [json.loads(x) for x in context.ledger.path.read_text().splitlines()]
    assert [(x["summary"]["name"], x["identity"]["config"]["rate"]) for x in lines] == [
        ("tiny", 0.07),
        ("more", 0.05),
    ]


def test_another_config_is_refused(context, mesh):
    context.train(run(mesh))
    other = run(mesh, config={"features": 13, "rate": 0.07}, batch_at=forbidden)
    with pytest.raises(StudyError, match=r"jsonl: tiny holds.*rate was 0.05, is 0.07"):
        resumed(context, resume=True).train(other)


def test_who_trained_it_does_not_matter(context, mesh):
    """Runs on another number of devices are accepted; other differences are not."""
    first = context.train(run(mesh))
    path = context.ledger.path
    line = json.loads(path.read_text())
    assert line["identity"]["devices"] == mesh.size
    line["identity"]["devices"] = 7
    path.write_text(json.dumps(line) + "\n")
    again = resumed(context, resume=True).train(run(mesh, batch_at=forbidden))
    assert again.summary == first.summary
    other = run(mesh, config={"features": 13, "rate": 0.07}, batch_at=forbidden)
    assert resumed(context, only=["more"]).train(other) is None
    # They are not accepted if batches depend on the number of devices.
    with pytest.raises(StudyError, match="devices was 7, is 2.*give --devices 7"):
        resumed(context, resume=True).train(run(mesh, batches_by_devices=True))


def test_several_write_into_one_file(context, mesh):
    """Lines that another process wrote meanwhile are kept."""
    mine, theirs = context.ledger, context.ledger
    identity = run(mesh).identity(mesh)
    theirs.keep({**identity, "name": "theirs"}, {"name": "theirs"})
    keep = functools.partial(mine.keep, {**identity, "name": "mine"}, {"name": "mine"})
    thread = threading.Thread(target=keep)
    with FileLock(mine.path.with_name(f".{mine.path.name}.lock")):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()  # it waits for the lock
        assert "mine" not in mine.path.read_text()
    thread.join()
    lines = [
        json.loads(x)["summary"]["name"] for x in mine.path.read_text().split("\n") if x
    ]
    assert lines == ["theirs", "mine"]


def test_numbers_lost_are_measured_again(context, mesh):
    """As if the process was killed after a run, before writing to the ledger."""
    first = context.train(run(mesh))
    context.ledger.path.unlink()
    again = resumed(context, resume=True).train(run(mesh, batch_at=forbidden))
    assert again.summary == first.summary
    assert context.ledger.path.exists()


def test_a_broken_file_is_told_and_kept(context, mesh):
    context.train(run(mesh))
    path = context.ledger.path
    path.write_text(broken := path.read_text() + '{"identity": 3\n')
    with pytest.raises(StudyError, match="line 2 is damaged"):
        context.train(run(mesh, "more", batch_at=forbidden))
    assert path.read_text() == broken


def test_models_are_read_where_a_page_needs_them(context, mesh):
    context.train(make_run(mesh=mesh))
    assert not context.ledger.path.exists()
    found = resumed(context, resume=True).train(make_run(mesh=mesh, batch_at=forbidden))
    assert found.model is not None
    assert found.log
