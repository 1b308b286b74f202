"""Training: a step against plain optax, errors, full disks."""

import dataclasses
import resource
import signal
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.studies.machinery.errors import Diverged, StudyError
from benchmarks.studies.machinery.losses import cross_entropy, forced
from benchmarks.studies.machinery.optimisers import Optimiser, adam, schedule
from benchmarks.studies.machinery.parallel import make_mesh, over_batch
from benchmarks.studies.machinery.step import Step
from benchmarks.studies.machinery.training import train
from tests.studies.tiny import TASK, Bag, logits, make_run


@pytest.mark.slow
def test_steps_are_those_of_optax_on_one_device(mesh):
    optimiser = adam(0.1, steps=9, warmup=2, clip=0.5)
    model = Bag(dropout_rate=0.0, rngs=nnx.Rngs(5))
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    step = Step(model, forced(logits, 0.1), optimiser, 0, mesh)

    def mean(params, batch):
        total, count = cross_entropy(
            nnx.merge(structure, params, rest)(batch), batch, 0.1
        )
        return total / count

    # Copies, because the step donates its first state, the model's arrays.
    params = jax.tree.map(np.asarray, params)
    held = optimiser.transform.init(params)
    for number in range(4):
        batch = TASK.batch_at(number)
        loss, gradient = jax.value_and_grad(mean)(params, batch)
        updates, held = optimiser.transform.update(gradient, held, params)
        params = optax.apply_updates(params, updates)
        measured = step(batch, number)
        np.testing.assert_allclose(measured.loss, loss, rtol=2e-6)
        norm = optax.tree.norm(gradient)
        np.testing.assert_allclose(measured.gradient_norm, norm, rtol=2e-5)
        assert measured.tokens == (batch.target_lengths - 1).sum()
        rate: Any = optimiser.rate(number)
        assert measured.learning_rate == pytest.approx(float(rate), abs=1e-9)
    for one, other in zip(
        jax.tree.leaves(step.state.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_follows_from_the_number_of_the_step(mesh):
    def losses(numbers, seed=0):
        still = Optimiser(optax.set_to_zero(), lambda step: 0.0, {})
        model = Bag(dropout_rate=0.5, rngs=nnx.Rngs(5))
        step = Step(model, forced(logits), still, seed, mesh)
        return [float(step(TASK.batch_at(0), n).loss) for n in numbers]

    first = losses([3, 4, 3])
    assert first[0] == first[2] != first[1]
    assert losses([4]) == [first[1]]
    assert losses([4], seed=1) != [first[1]]


def test_shares_of_a_batch_have_dropout_of_their_own(mesh):
    def of_ones(model, batch, rng):
        kept = model.dropout(jnp.ones((3, 64)))
        rows = jax.lax.all_gather(kept, "batch")
        return (rows[0] == rows[1]).all().astype(jnp.float32), jnp.int32(1)

    still = Optimiser(optax.set_to_zero(), lambda step: 0.0, {})
    step = Step(Bag(dropout_rate=0.5, rngs=nnx.Rngs(5)), of_ones, still, 0, mesh)
    assert step(TASK.batch_at(0), 0).loss == 0.0


def test_each_shape_is_compiled_once(mesh):
    step = Step(
        Bag(rngs=nnx.Rngs(5)), forced(logits), adam(0.1, steps=9, warmup=2), 0, mesh
    )
    step(TASK.batch_at(0), 0)
    spent = step.compile_seconds
    assert spent > 0
    step(TASK.batch_at(1), 1)
    assert step.compile_seconds == spent


def test_over_batch_is_the_function(mesh):
    model = Bag(rngs=nnx.Rngs(5))
    model.eval()
    batch = TASK.batch_at(0)
    np.testing.assert_allclose(
        over_batch(logits, mesh)(model, batch), model(batch), rtol=1e-6, atol=1e-6
    )


def test_smoothed_loss_is_that_of_optax():
    random = np.random.default_rng(0)
    batch = TASK.batch_at(2)
    labels = batch.target[:, 1:]
    given = random.standard_normal((*labels.shape, TASK.vocabulary_size), np.float32)
    counted = np.arange(labels.shape[1]) < batch.target_lengths[:, None] - 1
    for smoothing in (0.0, 0.3):
        smooth = optax.smooth_labels(
            jax.nn.one_hot(labels, TASK.vocabulary_size), smoothing
        )
        expected = np.where(counted, optax.softmax_cross_entropy(given, smooth), 0)
        total, count = cross_entropy(jnp.asarray(given), batch, smoothing)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
        assert count == counted.sum()


def test_schedules():
    rates: Any = schedule(0.5, steps=20, warmup=4, decay="inverse_sqrt")
    found = [float(rates(s)) for s in (0, 2, 4, 16)]
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.25], rtol=1e-6)
    others: Any = schedule(0.5, steps=20, warmup=4)
    found = [float(others(s)) for s in (1, 4, 12, 20)]
    np.testing.assert_allclose(found, [0.125, 0.5, 0.25, 0], atol=1e-7)
    with pytest.raises(ValueError, match="warmup: expected 1 to steps - 1 = 19"):
        schedule(0.5, steps=20, warmup=20)
    with pytest.raises(ValueError, match="decay: expected cosine or inverse_sqrt"):
        schedule(0.5, steps=20, warmup=2, decay=cast(Any, "linear"))


def test_a_run_that_diverges_says_so(mesh, place):
    def loss(model, batch, rng):
        return jnp.float32(jnp.nan) * model.out.bias[...].sum(), jnp.int32(3)

    with pytest.raises(Diverged, match="the loss is nan at step 1 "):
        train(make_run(mesh=mesh, loss=loss), place)


def test_the_best_must_be_among_the_numbers(mesh, place):
    with pytest.raises(StudyError, match="expected one of loss, perplexity.*'bleu'"):
        train(make_run(mesh=mesh, best="bleu"), place)


def test_a_folder_that_cannot_be_written(mesh, place):
    place.folder.parent.mkdir(exist_ok=True)
    place.folder.write_text("in the way")
    with pytest.raises(StudyError, match="cannot be written to .*--out"):
        train(make_run(mesh=mesh), place)


def test_too_little_room(mesh, place, monkeypatch):
    from benchmarks.studies.machinery import checkpoints

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StudyError, match="4 checkpoints need .* are free; make"):
        train(make_run(mesh=mesh), place)


@pytest.mark.slow
# Threads of Orbax may report to an event loop that is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("size", "message"),
    [(1800, r"cannot be written to \("), (4000, "the checkpoint of step 10 cannot")],
)
def test_a_disk_that_fills_up(mesh, place, size, message):
    """A limit of the file size, whose error is like that of a full disk."""
    wide = dict(make_model=lambda: Bag(97, rngs=nnx.Rngs(3)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN

    def batch_at(number):
        if number == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return TASK.batch_at(number)

    try:
        with pytest.raises(StudyError, match=message):
            train(make_run(mesh=mesh, batch_at=batch_at, **wide), place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = train(make_run(mesh=mesh, **wide), place._replace(resume=True))
    assert found.summary["steps"] == 23
    losses = [line["step"] for line in found.log if "loss" in line]
    assert losses == list(range(1, 24))


def test_too_many_devices():
    many = jax.device_count() + 1
    told = rf"--devices: expected at most {many - 1}, .*got {many}"
    with pytest.raises(StudyError, match=told):
        make_mesh(many)


def test_a_run_begins_with_the_parameters_of_another(mesh, place):
    first = train(
        make_run("first", mesh=mesh, steps=4),
        place._replace(folder=place.folder / "first"),
    )

    def begin(model):
        nnx.update(model, nnx.state(first.model, nnx.Param))

    run = make_run("second", mesh=mesh, steps=4, begin=begin)
    second = place._replace(folder=place.folder / "second", resume=True)
    found = train(run, second)
    evaluations = [line["evaluation"] for line in found.log if "evaluation" in line]
    assert evaluations[0]["loss"] == pytest.approx(first.summary["best"]["loss"])
    # A finished run does not call ``begin``.
    done = dataclasses.replace(run, begin=lambda model: pytest.fail("it began"))
    assert train(done, second).summary == found.summary
