"""Scores whose comparison is not an inner product: additive, concat, MLP."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from attnlab._src import arguments
from attnlab._src.reverse import reverse_only
from attnlab._src.scores.inner import check_weight, project
from attnlab._src.types import (
    Array,
    PyTree,
    Score,
    accumulation_dtype,
    pytree,
    static,
)
from attnlab._src.varying import vary_like

#: Ends the error of forward mode: "forward mode (...) of <this>".
_FORWARD_MODE = "additive and concat scores does not exist"


def _tile_type(*arrays: Array) -> np.dtype:
    return accumulation_dtype(*(a.dtype for a in arrays))


def tanh_sum(weight: Array, query: Array, key: Array) -> Array:
    """``sum_p weight[p] tanh(query[:, p] + key[:, p])``.

    ``[P], [q, P], [k, P] -> [q, k]``

    One hidden unit after another is added into the tile, so that no array ``[q, k, P]``
    exists, forward or backward.
    """
    # Inside shard_map all must vary over the same axes: then JAX sums the gradients.
    everything = reverse_only((weight, query, key), _FORWARD_MODE)
    return _tanh_sum(*(vary_like(x, everything) for x in everything))


@jax.custom_vjp
def _tanh_sum(weight: Array, query: Array, key: Array) -> Array:
    dtype = _tile_type(weight, query, key)
    # Hidden units come first, so that each is a contiguous row.
    query, key = query.astype(dtype).T, key.astype(dtype).T
    weight = weight.astype(dtype)

    def unit(p: Array, total: Array) -> Array:
        return total + weight[p] * jnp.tanh(query[p][:, None] + key[p][None, :])

    start = jnp.zeros((query.shape[1], key.shape[1]), dtype)
    start = vary_like(start, (weight, query, key))
    return lax.fori_loop(0, weight.shape[0], unit, start)


def _tanh_sum_forward(
    weight: Array, query: Array, key: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _tanh_sum(weight, query, key), (weight, query, key)


def _tanh_sum_backward(
    saved: tuple[Array, Array, Array], d_tile: Array
) -> tuple[Array, Array, Array]:
    weight, query, key = saved
    dtype = d_tile.dtype
    q, k, w = query.astype(dtype).T, key.astype(dtype).T, weight.astype(dtype)

    def unit(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, tuple]:
        q_p, k_p, w_p = xs
        t = jnp.tanh(q_p[:, None] + k_p[None, :])
        # The barrier makes one array, so that tanh is not evaluated again for each sum.
        weighted = lax.optimization_barrier(d_tile * (1 - t * t))
        d_q = weighted.sum(1)
        d_k = weighted.sum(0)
        return None, (w_p * d_q, w_p * d_k, (d_tile * t).sum())

    _, (d_query, d_key, d_weight) = lax.scan(unit, None, (q, k, w))
    return (
        d_weight.astype(weight.dtype),
        d_query.T.astype(query.dtype),
        d_key.T.astype(key.dtype),
    )


_tanh_sum.defvjp(_tanh_sum_forward, _tanh_sum_backward)


@pytree
class Additive(Score):
    """``score(q, k) = v . tanh(q W_q + b + k W_k)``.

    Attributes:
        query_weight: ``[N or 1, H of query, P]``.
        key_weight: ``[K or 1, H of key, P]``.
        bias: ``[N or 1, P]``, or None.
        weight: ``[N or 1, P]``, v.

    References:
        Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align
        and Translate", 2015, appendix A.1.2 (their v_a, W_a, U_a).
    """

    query_weight: Any
    key_weight: Any
    bias: Any
    weight: Any

    @classmethod
    def init(
        cls,
        rng: Array,
        query_size: int,
        key_size: int | None = None,
        *,
        hidden_size: int,
        num_heads: int = 1,
        num_key_heads: int | None = None,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
    ) -> "Additive":
        """Weights of variance ``1 / fan-in``, a zero bias.

        (Bahdanau's v is 0 at first, so that all keys have equal weights; do so with
        ``dataclasses.replace(score, weight=jnp.zeros_like(score.weight))``.)

        Args:
            rng: a PRNG key.
            query_size: H of the query.
            key_size: H of the key; the query's if not given.
            hidden_size: P, the number of hidden units.
            num_heads: N, or 1 to share the parameters.
            num_key_heads: K; ``num_heads`` if not given.
            bias: whether there is one.
            dtype: of the parameters.
        """
        key_size = query_size if key_size is None else key_size
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        arguments.prng_key("rng", rng)
        arguments.sizes(
            query_size=query_size,
            key_size=key_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
        )
        first, second, third = jax.random.split(rng, 3)

        def normal(rng: Array, shape: tuple[int, ...], fan_in: int) -> Array:
            return jax.random.normal(rng, shape, dtype) / math.sqrt(fan_in)

        return cls(
            normal(first, (num_heads, query_size, hidden_size), query_size),
            normal(second, (num_key_heads, key_size, hidden_size), key_size),
            jnp.zeros((num_heads, hidden_size), dtype) if bias else None,
            normal(third, (num_heads, hidden_size), hidden_size),
        )

    def project_query(self, query: Array) -> Array:
        """``[B, T, N, H] -> [B, T, N, P]``."""
        return project(query, "query_weight", self.query_weight, self.bias)

    def project_key(self, key: Array) -> Array:
        """``[B, S, K, H] -> [B, S, K, P]``."""
        return project(key, "key_weight", self.key_weight)

    def pair_params(self) -> PyTree:
        """v, ``[N or 1, P]``."""
        check_weight(
            "score: weight", self.weight, "N or 1", self.query_weight.shape[-1]
        )
        return self.weight

    def compare(self, params: PyTree, query: Array, key: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return tanh_sum(params, query, key)

    @property
    def floats_per_pair(self) -> int:
        """See :class:`attnlab.Score`."""
        return 1

    def flops_per_pair(self, projected_size: int) -> int:
        """An addition, a multiplication and an addition for each hidden unit."""
        return 3 * projected_size

    def transcendentals_per_pair(self, projected_size: int) -> int:
        """One tanh for each hidden unit."""
        return projected_size

    def flops_per_query(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 2 * head_size * self.query_weight.shape[-1]

    def flops_per_key(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 2 * head_size * self.key_weight.shape[-1]


@pytree
class Concat(Additive):
    """``score(q, k) = v . tanh(W [q; k])``: additive without a bias, W split in two.

    References:
        Luong, Pham, Manning, 2015, section 3.1 ("concat").
    """

    @classmethod
    def init(cls, rng: Array, *args: Any, **kwargs: Any) -> "Concat":
        """As :meth:`attnlab.scores.additive.init`, without the argument ``bias``."""
        if "bias" in kwargs:
            raise TypeError("bias: concat has none; use additive")
        made = Additive.init(rng, *args, **kwargs, bias=False)
        return cls(made.query_weight, made.key_weight, None, made.weight)


@pytree
class Mlp(Score):
    """A perceptron on the pair: ``act(... act(q W_q + b + k W_k) ...) . v``.

    Attributes:
        query_weight: ``[N or 1, H of query, P]``.
        key_weight: ``[K or 1, H of key, P]``.
        bias: ``[N or 1, P]``.
        hidden: for each further hidden layer a weight ``[N or 1, in, out]`` and a bias
            ``[N or 1, out]``.
        weight: ``[N or 1, last hidden size]``, v.
        activation: applied after each hidden layer; compared by identity.

    References:
        Bahdanau, Cho, Bengio, 2015, section 3.1: the alignment model as a feedforward
        network, here of any depth.
    """

    query_weight: Any
    key_weight: Any
    bias: Any
    hidden: tuple[tuple[Any, Any], ...]
    weight: Any
    activation: Callable[[Array], Array] = static(default=jax.nn.relu)

    @classmethod
    def init(
        cls,
        rng: Array,
        query_size: int,
        key_size: int | None = None,
        *,
        hidden_sizes: Sequence[int],
        num_heads: int = 1,
        num_key_heads: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.relu,
        dtype: DTypeLike = jnp.float32,
    ) -> "Mlp":
        """Normal weights, zero biases.

        The variance is ``1 / H`` in the first layer (H of the query or of the key),
        ``2 / fan-in`` in the further ones (He et al., 2015), ``1 / fan-in`` in v.

        Args:
            rng: a PRNG key.
            query_size: H of the query.
            key_size: H of the key; the query's if not given.
            hidden_sizes: the sizes of the hidden layers, at least one; the first is P.
            num_heads: N, or 1 to share the parameters.
            num_key_heads: K; ``num_heads`` if not given.
            activation: a function of one array, elementwise.
            dtype: of the parameters.
        """
        if not isinstance(hidden_sizes, Sequence):
            raise TypeError(
                f"hidden_sizes: expected a sequence of sizes, got {hidden_sizes!r}; "
                "write hidden_sizes=(8,)"
            )
        if not hidden_sizes:
            raise ValueError("hidden_sizes: expected at least one size, got none")
        for hidden_size in hidden_sizes:
            arguments.size("hidden_sizes", hidden_size)
        if not callable(activation):
            raise TypeError(
                f"activation: expected a function, got {activation!r}; for instance "
                "jax.nn.relu"
            )
        arguments.prng_key("rng", rng)
        rngs = jax.random.split(rng, len(hidden_sizes) + 2)
        first = Additive.init(
            rngs[0],
            query_size,
            key_size,
            hidden_size=hidden_sizes[0],
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            dtype=dtype,
        )
        hidden = tuple(
            (
                jax.random.normal(r, (num_heads, a, b), dtype) * math.sqrt(2 / a),
                jnp.zeros((num_heads, b), dtype),
            )
            for r, a, b in zip(
                rngs[2:], hidden_sizes[:-1], hidden_sizes[1:], strict=False
            )
        )
        last = jax.random.normal(rngs[1], (num_heads, hidden_sizes[-1]), dtype)
        return cls(
            first.query_weight,
            first.key_weight,
            first.bias,
            hidden,
            last / math.sqrt(hidden_sizes[-1]),
            activation,
        )

    def project_query(self, query: Array) -> Array:
        """``[B, T, N, H] -> [B, T, N, P]``."""
        return project(query, "query_weight", self.query_weight, self.bias)

    def project_key(self, key: Array) -> Array:
        """``[B, S, K, H] -> [B, S, K, P]``."""
        return project(key, "key_weight", self.key_weight)

    def pair_params(self) -> PyTree:
        """The layers after the first, and v."""
        size = self.query_weight.shape[-1]
        for i, (matrix, bias) in enumerate(self.hidden):
            name = f"score: hidden[{i}]"
            check_weight(f"{name}[0]", matrix, "N or 1", size, "out")
            size = matrix.shape[-1]
            check_weight(f"{name}[1]", bias, "N or 1", size)
        check_weight("score: weight", self.weight, "N or 1", size)
        return self.hidden, self.weight

    def compare(self, params: PyTree, query: Array, key: Array) -> Array:
        """See :class:`attnlab.Score`."""
        dtype = _tile_type(query, key)
        everything = query, key, params
        query, key, (hidden, weight) = jax.tree.map(
            lambda x: vary_like(x.astype(dtype), everything), everything
        )

        # One query after another, computed again in the backward pass: the arrays of
        # the layers then fit the cache.
        @jax.checkpoint
        def row(query: Array) -> Array:
            x = self.activation(query[None] + key)
            for matrix, bias in hidden:
                x = self.activation(x @ matrix + bias[None])
            return x @ weight

        return lax.map(row, query)

    @property
    def floats_per_pair(self) -> int:
        """See :class:`attnlab.Score`."""
        return 1

    def flops_per_pair(self, projected_size: int) -> int:
        """See :class:`attnlab.Score`; an activation counts as one operation."""
        total, size = 2 * projected_size, projected_size
        for matrix, _ in self.hidden:
            total += 2 * size * matrix.shape[-1] + 2 * matrix.shape[-1]
            size = matrix.shape[-1]
        return total + 2 * size

    def transcendentals_per_pair(self, projected_size: int) -> int:
        """One activation for each hidden unit, unless it is relu."""
        if self.activation is jax.nn.relu:
            return 0
        return projected_size + sum(m.shape[-1] for m, _ in self.hidden)

    def flops_per_query(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 2 * head_size * self.query_weight.shape[-1]

    def flops_per_key(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 2 * head_size * self.key_weight.shape[-1]
