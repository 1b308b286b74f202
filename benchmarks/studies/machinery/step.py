"""One training step: a pure function of the state, the batch and the step's number."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.studies.machinery.losses import Loss
from benchmarks.studies.machinery.optimisers import Optimiser
from benchmarks.studies.machinery.parallel import AXIS, divided, on_shares, replicated


class State(NamedTuple):
    """The training state.

    Attributes:
        params: parameters of the model.
        optimiser: state of the optax transformation.
    """

    params: Any
    optimiser: Any


class Measured(NamedTuple):
    """Measurements of one step.

    Attributes:
        loss: mean over target tokens, before the update.
        gradient_norm: global norm, before clipping.
        learning_rate: of this update.
        tokens: target tokens in the batch.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array


def reseed(model: nnx.Module, rng: jax.Array) -> None:
    """Reseeds every stream of random numbers in a model from ``rng``.

    A stream has the name that ``nnx.Rngs`` gave it; those of ``Rngs(0)``, including
    dropout's, are named ``default``.
    """
    graph = nnx.iter_graph(model)
    tags = sorted({s.key.tag for _, s in graph if isinstance(s, nnx.RngStream)})
    keys = {tag: jax.random.fold_in(rng, i) for i, tag in enumerate(tags)}
    options: dict[str, Any] = {"policy": "match_shape", **keys}
    nnx.reseed(model, **options)


class Step:
    """A compiled step, and the state of the model that it trains.

    Attributes:
        state: the state after the last step.
        compile_seconds: compile time so far; each shape of batch is compiled once.
        devices: how many devices share a batch.
    """

    def __init__(
        self,
        model: nnx.Module,
        loss: Loss,
        optimiser: Optimiser,
        seed: int,
        mesh: Mesh,
    ):
        """A step that has not run.

        Args:
            model: a new model, with dropout on.
            loss: see :data:`Loss`.
            optimiser: see :class:`Optimiser`.
            seed: seed of dropout.
            mesh: devices that share a batch.
        """
        transform, rate, _ = optimiser
        self._structure, params, rest = nnx.split(model, nnx.Param, ...)
        whole = replicated(mesh)
        self._whole, self.devices = whole, mesh.size
        self._rest = jax.device_put(rest, whole)
        self.state = jax.device_put(State(params, transform.init(params)), whole)
        self.compile_seconds = 0.0
        self._compiled: dict[Any, Any] = {}

        def local(params: Any, rest: Any, batch: Any, rng: jax.Array) -> Any:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(AXIS))

            def total(params: Any) -> tuple[jax.Array, jax.Array]:
                model = nnx.merge(self._structure, params, rest, copy=True)
                reseed(model, rng)
                return loss(model, batch, rng)

            value, gradient = jax.value_and_grad(total, has_aux=True)(params)
            return jax.lax.psum((*value, gradient), AXIS)

        specs = (P(), P(), P(AXIS), P())
        summed = on_shares(local, mesh, specs, P())

        @functools.partial(
            jax.jit,
            donate_argnums=0,
            in_shardings=(whole, whole, divided(mesh), whole),
            out_shardings=whole,
        )
        def step(
            state: State, rest: Any, batch: Any, number: jax.Array
        ) -> tuple[State, Measured]:
            rng = jax.random.fold_in(jax.random.key(seed), number)
            total, count, gradient = summed(state.params, rest, batch, rng)
            # A batch may have no target token.
            least = jnp.maximum(count, 1)
            gradient = jax.tree.map(lambda g: g / least.astype(g.dtype), gradient)
            updates, optimiser = transform.update(
                gradient, state.optimiser, state.params
            )
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(gradient)
            measured = Measured(total / least, norm, jnp.asarray(rate(number)), count)
            return State(params, optimiser), measured

        self._step = step

    def __call__(self, batch: Any, number: int) -> Measured:
        """Makes one step.

        Args:
            batch: the batch of this step.
            number: number of this step, from 0.
        """
        arguments = (self.state, self._rest, batch, np.uint32(number))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tuple(batch))
        if shapes not in self._compiled:
            started = time.perf_counter()
            self._compiled[shapes] = self._step.lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - started
        self.state, measured = self._compiled[shapes](*arguments)
        return jax.device_get(measured)

    def model(self, params: Any = None) -> nnx.Module:
        """The model with dropout off.

        Args:
            params: its parameters; the present ones if not given.
        """
        given = self.state.params if params is None else params
        # Copies, because the next step donates its arguments.
        copy = jax.tree.map(jnp.copy, (given, self._rest))
        model = nnx.merge(self._structure, *copy)
        model.eval()
        return model

    def restore(self, state: State) -> None:
        """Continues from another state, a pytree of host arrays."""
        self.state = jax.device_put(state, self._whole)
