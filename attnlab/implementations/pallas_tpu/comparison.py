"""Scores as tile kernels: inner products on the matrix unit, additive, perceptrons."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab.implementations.pallas_tpu.blocks import Blocks
from attnlab.implementations.pallas_tpu.call import NT, Products
from attnlab.implementations.pallas_tpu.logits import Part
from attnlab.implementations.pallas_tpu.operands import Place, Reader
from attnlab.modifiers.bias import SoftCap
from attnlab.scores.pairwise import Mlp
from attnlab.scores.projected import bare
from attnlab.types import Array, AttentionInputs

#: Keys of an additive score that are compared in one step of a loop, and hidden units
#: whose gradients are taken side by side: the sums of one wait for each other.
_KEYS, _UNITS = 16, 8


class Given(NamedTuple):
    """What a comparison reads: references, and how matrices are multiplied.

    Attributes:
        q: the block of queries, ``[P, queries]``; in the backward pass of an inner
            product ``[queries, P]``.
        k: the block of keys, ``[keys, P]``.
        k_across: the same as ``[P, keys]``; None in the forward pass.
        params: to ``Comparison.params``.
        room: to ``Comparison.room``.
        product: of matrices.
    """

    q: Any
    k: Any
    k_across: Any
    params: Sequence[Any]
    room: Sequence[Any]
    product: Products


class Sums(NamedTuple):
    """References to the gradients that a comparison adds to.

    Attributes:
        q: ``[P, queries]``.
        k: ``[keys, P]``.
        params: of ``Comparison.gradient_shapes``; none where nobody asks.
    """

    q: Any
    k: Any
    params: Sequence[Any]


class Comparison:
    """How the logits of a block are computed. This one: inner products."""

    #: Whether the backward pass reads queries as ``[P, queries]``, as the forward does.
    queries_across = False

    def __init__(self, inputs: AttentionInputs):
        """For these inputs."""
        self.inputs = inputs

    @property
    def dtype(self) -> Any:
        """In which the kernel holds queries and keys."""
        return self.inputs.query.dtype

    def bound(self) -> Array | None:
        """What no logit exceeds in size; None: unknown."""
        inputs = self.inputs
        capped = _capped(inputs)
        if capped is not None or inputs.modifiers:
            return capped
        norms = [
            jnp.square(x.astype(jnp.float32)).sum(-1).max(1, initial=0)
            for x in (inputs.query, inputs.key)
        ]
        queries = norms[0].reshape(*norms[1].shape, -1)
        return jnp.sqrt((queries * norms[1][..., None]).max(initial=0))

    def params(self, place: Callable[..., Place]) -> list[Reader]:
        """The parameters of the score, as the kernel takes them."""
        return []

    def room(self, blocks: Blocks) -> list[Any]:
        """Memory that the comparison needs."""
        return []

    def logits(self, given: Given, part: Part) -> Array:
        """Of a part of the keys, ``[keys, queries]``."""
        return given.product(given.k[part.keys, :], given.q[...])

    def logits_again(self, given: Given, part: Part) -> Array:
        """As ``logits``, in the backward pass: see ``queries_across``."""
        return given.product(given.k[part.keys, :], given.q[...], NT)

    def gradient_shapes(self, blocks: Blocks) -> list[tuple[int, ...]]:
        """Of what ``pull`` sums for the parameters of one head."""
        return []

    def pull(self, d: Array, given: Given, part: Part, sums: Sums) -> None:
        """Adds what a gradient ``d [keys, queries]`` makes of those of the inputs."""
        sums.q[...] += given.product(given.k_across[:, part.keys], d)
        sums.k[part.keys, :] += given.product(d, given.q[...])

    def finish_gradients(self, found: Sequence[Array]) -> Any:
        """Sums ``[B, N, *shape]`` as gradients ``[B, N, 1, 1, *payload]``."""
        raise NotImplementedError("an inner product has no parameters")


class _AdditiveComparison(Comparison):
    @property
    def dtype(self) -> Any:
        return jnp.float32

    def _weight(self) -> Array:
        """``[B or 1, N or 1, P]``."""
        (weight,) = jax.tree.leaves(self.inputs.pair_params)
        return weight.reshape(*weight.shape[:2], -1).astype(jnp.float32)

    def bound(self) -> Array | None:
        capped = _capped(self.inputs)
        if capped is not None or self.inputs.modifiers:
            return capped
        return jnp.abs(self._weight()).sum(-1).max(initial=0)

    def params(self, place: Callable[..., Place]) -> list[Reader]:
        # In vector memory: in scalar memory the compiler's static profile fails.
        return [_by_head(self._weight()[..., None], place)]

    def room(self, blocks: Blocks) -> list[Any]:
        return [pltpu.VMEM((blocks.chunk, blocks.q), jnp.float32)]

    def logits(self, given: Given, part: Part) -> Array:
        (weight,), (z,), q, k = given.params, given.room, given.q, given.k

        def some(i: Array, _: None) -> None:
            key = k[pl.ds(part.first + i * _KEYS, _KEYS), :]
            total = jnp.zeros((_KEYS, z.shape[1]), jnp.float32)
            for p in range(weight.shape[0]):
                unit = slice(p, p + 1)
                total += weight[unit, :] * jnp.tanh(key[:, unit] + q[unit, :])
            z[pl.ds(i * _KEYS, _KEYS), :] = total

        _loop(part.size // _KEYS, some, None)
        return z[...]

    queries_across = True
    logits_again = logits

    def gradient_shapes(self, blocks: Blocks) -> list[tuple[int, ...]]:
        (weight,) = jax.tree.leaves(self.inputs.pair_params)
        return [(weight.shape[-1], blocks.q)]

    def pull(self, d: Array, given: Given, part: Part, sums: Sums) -> None:
        (weight,), (z,), q, k = given.params, given.room, given.q, given.k
        size = k.shape[1]
        z[...] = d
        lane = lax.broadcasted_iota(jnp.int32, (_KEYS, size), 1)

        def eighths(x: Array) -> Array:
            return x.reshape(-1, 8, x.shape[1]).sum(0)

        def units(rows: list[slice]) -> None:
            def some(i: Array, found: list[Any]) -> list[Any]:
                keys = pl.ds(part.first + i * _KEYS, _KEYS)
                key, d_key = k[keys, :], sums.k[keys, :]
                d, more = z[pl.ds(i * _KEYS, _KEYS), :], []
                for unit, (d_query, d_weight) in zip(rows, found, strict=True):
                    t = jnp.tanh(key[:, unit] + q[unit, :])
                    weighted = d * t
                    inner = d - weighted * t
                    pulled = inner.sum(1, keepdims=True) * weight[unit, :]
                    d_key += jnp.where(lane == unit.start, pulled, 0)
                    more += [(d_query + eighths(inner), d_weight + eighths(weighted))]
                sums.k[keys, :] = d_key
                return more

            zero = jnp.zeros((8, z.shape[1]), jnp.float32)
            start = [(zero, zero)] * len(rows)
            found = _loop(part.size // _KEYS, some, start)
            for unit, (d_query, d_weight) in zip(rows, found, strict=True):
                sums.q[unit, :] += d_query.sum(0, keepdims=True) * weight[unit, :]
                for ref in sums.params:
                    ref[unit, :] += d_weight.sum(0, keepdims=True)

        every = [slice(p, p + 1) for p in range(size)]
        for first in range(0, size, _UNITS):
            units(every[first : first + _UNITS])

    def finish_gradients(self, found: Sequence[Array]) -> Any:
        structure = jax.tree.structure(self.inputs.pair_params)
        return jax.tree.unflatten(structure, [found[0].sum(-1)])


class _MlpComparison(Comparison):
    @property
    def dtype(self) -> Any:
        return jnp.float32

    def _columns(self) -> list[Array]:
        """Transposed matrices, vectors as columns: ``[B or 1, N or 1, rows, cols]``."""

        def column(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], *x.shape[4:]).astype(jnp.float32)
            return x.swapaxes(2, 3) if x.ndim == 4 else x[..., None]

        return [column(x) for x in jax.tree.leaves(self.inputs.pair_params)]

    def bound(self) -> Array | None:
        return _capped(self.inputs)

    def params(self, place: Callable[..., Place]) -> list[Reader]:
        return [_by_head(x, place) for x in self._columns()]

    def room(self, blocks: Blocks) -> list[Any]:
        return [pltpu.VMEM((blocks.chunk, blocks.q), jnp.float32)]

    def one_key(
        self, query: Array, key: Array, params: Sequence[Array], product: Products
    ) -> Array:
        """``[P, queries], [P, 1] -> [1, queries]``."""
        activation = bare(self.inputs.score).activation
        *hidden, weight = params
        x = activation(query + key)
        for matrix, bias in zip(hidden[::2], hidden[1::2], strict=True):
            x = activation(product(matrix, x) + bias)
        return (weight * x).sum(0, keepdims=True)

    def logits(self, given: Given, part: Part) -> Array:
        (z,), q, k = given.room, given.q, given.k
        product = given.product._replace(dtype=jnp.float32)

        def one(i: Array, _: None) -> None:
            key = k[pl.ds(part.first + i, 1), :].T
            params_ = [ref[...] for ref in given.params]
            z[pl.ds(i, 1), :] = self.one_key(q[...], key, params_, product)

        _loop(part.size, one, None)
        return z[...]

    queries_across = True
    logits_again = logits

    def gradient_shapes(self, blocks: Blocks) -> list[tuple[int, ...]]:
        return [x.shape[2:] for x in self._columns()]

    def pull(self, d: Array, given: Given, part: Part, sums: Sums) -> None:
        (z,), q, k = given.room, given.q, given.k
        product = given.product._replace(dtype=jnp.float32)
        z[...] = d

        values = [ref[...] for ref in given.params]

        def one(
            i: Array, total: tuple[Array, list[Array]]
        ) -> tuple[Array, list[Array]]:
            row = pl.ds(part.first + i, 1)
            _, pull = jax.vjp(
                lambda q, k, params: self.one_key(q, k, params, product),
                q[...],
                k[row, :].T,
                values,
            )
            d_query, d_key, d_params = pull(z[pl.ds(i, 1), :])
            sums.k[row, :] += d_key.T
            return jax.tree.map(
                jnp.add, total, (d_query, d_params if sums.params else [])
            )

        start = jnp.zeros(q.shape, jnp.float32), [jnp.zeros_like(x) for x in values]
        start = start if sums.params else (start[0], [])
        d_query, d_params = _loop(part.size, one, start)
        sums.q[...] += d_query
        for ref, found in zip(sums.params, d_params, strict=True):
            ref[...] += found

    def finish_gradients(self, found: Sequence[Array]) -> Any:
        leaves, structure = jax.tree.flatten(self.inputs.pair_params)
        # A matrix was held transposed, a vector as a column.
        found = [
            x.swapaxes(2, 3) if leaf.ndim == 6 else x[..., 0]
            for x, leaf in zip(found, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, found)


def _loop(count: int, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """``lax.fori_loop`` from 0, whose counter is int32 in x64 mode, too."""
    with jax.enable_x64(False):
        return lax.fori_loop(0, count, body, start)


def _by_head(x: Array, place: Callable[..., Place]) -> Reader:
    """``[B or 1, N or 1, rows, columns]``, whole, of whom a step works for."""

    def index(*index: Any) -> tuple[Any, ...]:
        at = place(*index)
        example = at.example if x.shape[0] > 1 else 0
        return example, at.head if x.shape[1] > 1 else 0, 0, 0

    spec = pl.BlockSpec((None, None, *x.shape[2:]), index)
    return Reader(x, spec, lambda ref, *_: ref[...])


def comparison(inputs: AttentionInputs) -> Comparison:
    """How the logits of these inputs are computed."""
    score = bare(inputs.score)
    if score.is_inner_product:
        return Comparison(inputs)
    if isinstance(score, Mlp):
        return _MlpComparison(inputs)
    return _AdditiveComparison(inputs)


def _capped(inputs: AttentionInputs) -> Array | None:
    """The bound that a soft cap sets, where it is the last modifier."""
    # A subclass may do something else.
    if not (inputs.modifiers and type(inputs.modifiers[-1]) is SoftCap):
        return None
    (cap,) = inputs.modifier_operands[-1]
    return jnp.abs(cap).max(initial=0).astype(jnp.float32)
