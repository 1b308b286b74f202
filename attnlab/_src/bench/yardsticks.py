"""Yardsticks: contenders for comparison where no other library has the attention."""

import jax
import jax.numpy as jnp

from attnlab._src.bench.cases import Case
from attnlab._src.bench.contenders import Prepared, compile_call
from attnlab._src.bench.machine import free_memory, read_everything
from attnlab._src.scores.pairwise import Additive
from attnlab._src.types import Array


class NaiveAdditive:
    """The additive score computed directly, with an array ``[T, S, hidden]``."""

    name = "naive"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if not isinstance(case.score, Additive):
            return "it has the additive score only"
        hidden = case.score.weight.shape[-1]
        # Forward and backward store three such arrays: hidden units, their gradient,
        # and an intermediate one.
        pairs = case.spec.batch * case.spec.heads * case.spec.queries * case.spec.length
        needed, free = 3 * 4 * pairs * hidden, free_memory()
        if needed > free / 2:
            return (
                f"needs about {needed / 2**30:.1f} GiB, more than half of the "
                f"{free / 2**30:.1f} GiB that are free"
            )
        return None

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""

        def function(
            query: Array, key: Array, value: Array, score: Additive, mask: Array | None
        ) -> Array:
            group = query.shape[2] // key.shape[2]
            q, k = score.project_query(query), score.project_key(key)
            k, value = (jnp.repeat(x, group, 2) for x in (k, value))
            hidden = jnp.tanh(q[:, :, None] + k[:, None])
            # A matrix product would halve the time of the backward pass, but sums the
            # gradient of the weight pair by pair: at T = S = 2,048 its error is 17
            # times the allowed one.
            logits = (hidden * score.weight[None, None, None]).sum(-1)
            if mask is not None:
                logits = jnp.where(jnp.moveaxis(mask, 1, 3), logits, -jnp.inf)
            weights = jax.nn.softmax(logits.astype(jnp.float32), 2).astype(value.dtype)
            return jnp.einsum("btsn,bsnd->btnd", weights, value)

        arguments = (case.query, case.key, case.value, case.score, case.dense_mask())
        return compile_call(function, arguments, case.cotangent if backward else None)


class ReadKeysAndValues:
    """Only reads all keys and values: a lower bound for a decoding step."""

    name = "read"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        return None

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if backward:
            raise NotImplementedError("reading keys and values has no backward pass")
        # Its own copies, as those of everyone are by now out of the caches.
        key, value = case.key + 0, case.value + 0

        def read(key: Array, value: Array) -> tuple[Array, Array]:
            return read_everything(key), read_everything(value)

        compiled = jax.jit(read).lower(key, value).compile()
        return Prepared(lambda: compiled(key, value), lambda returned: {}, None, None)


YARDSTICKS = {each.name: each for each in (NaiveAdditive(), ReadKeysAndValues())}
