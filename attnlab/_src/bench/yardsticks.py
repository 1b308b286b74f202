"""What attention is measured by where no other library computes it."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab._src.bench.cases import Case
from attnlab._src.bench.contenders import Prepared, compile_call
from attnlab._src.bench.machine import free_memory, read_everything
from attnlab._src.scores.pairwise import Additive
from attnlab._src.types import Array


class NaiveAdditive:
    """The formula of the additive score as one writes it down: ``[T, S, hidden]``."""

    name = "naive"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if not isinstance(case.score, Additive):
            return "it has the additive score only"
        hidden = case.score.weight.shape[-1]
        # Forward and backward hold the hidden units, their gradient, and one between.
        pairs = case.spec.batch * case.spec.heads * case.spec.queries * case.spec.length
        needed, free = 3 * 4 * pairs * hidden, free_memory()
        if needed > free / 2:
            return (
                f"needs about {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB free "
                "half may be used"
            )
        return None

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""

        def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> Array:
            group = query.shape[2] // key.shape[2]
            q, k = score.project_query(query), score.project_key(key)
            k, value = (jnp.repeat(x, group, 2) for x in (k, value))
            hidden = jnp.tanh(q[:, :, None] + k[:, None])
            # As a matrix product its backward pass takes half the time, but adds up the
            # gradient of the weight one pair after another: at T = S = 2,048 that is
            # off by 17 times what the check allows.
            logits = (hidden * score.weight[None, None, None]).sum(-1)
            if mask is not None:
                logits = jnp.where(jnp.moveaxis(mask, 1, 3), logits, -jnp.inf)
            weights = jax.nn.softmax(logits.astype(jnp.float32), 2).astype(value.dtype)
            return jnp.einsum("btsn,bsnd->btnd", weights, value)

        arguments = (case.query, case.key, case.value, case.score, case.dense_mask())
        return compile_call(function, arguments, case.cotangent if backward else None)


class ReadKeysAndValues:
    """Reads all keys and values and computes nothing: no decoding step is faster."""

    name = "read"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        return None

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if backward:
            raise NotImplementedError("a backward pass does more than read")
        # Its own copies, as those of everyone are by now out of the caches.
        key, value = case.key + 0, case.value + 0

        def read(key: Any, value: Any) -> Any:
            return read_everything(key), read_everything(value)

        compiled = jax.jit(read).lower(key, value).compile()
        return Prepared(lambda: compiled(key, value), lambda returned: {}, None, None)


YARDSTICKS = {each.name: each for each in (NaiveAdditive(), ReadKeysAndValues())}
