"""Scores computed in kernels: inner products on the matrix unit, additive, MLP."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from attnlab._src.exact import exactly
from attnlab._src.implementations.deferred import scaled_query, scaling_rounds
from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.implementations.pallas_tpu.call import NT, Products
from attnlab._src.implementations.pallas_tpu.logits import Part
from attnlab._src.implementations.pallas_tpu.operands import Place, Reader
from attnlab._src.modifiers.bias import SoftCap
from attnlab._src.scores.pairwise import Additive, Mlp
from attnlab._src.scores.projected import comparison_class, unwrapped
from attnlab._src.types import Array, AttentionInputs, PyTree

f32 = jnp.float32

#: Unrolling of loops of the additive score, so that independent operations overlap:
#: keys per step in the logits; keys and hidden units per step in the gradients, and
#: keys per step when their sums over queries are finished.
_COMPARED = 16
_PULLED, _UNITS, _FINISHED = 32, 8, 128
_LANES = 128


class Given(NamedTuple):
    """Arguments of a comparison: references, and how matrices are multiplied.

    Attributes:
        q: the block of queries, ``[P, queries]``; in the backward pass of an inner
            product ``[queries, P]``.
        k: the block of keys, ``[keys, P]``.
        k_across: the same as ``[P, keys]``; None in the forward pass.
        params: references to ``Comparison.params``.
        room: references to the scratch memory ``Comparison.room``.
        product: multiplies matrices.
        scale: ``head_scale``; None if there is none, or if queries are scaled by it.
    """

    q: Any
    k: Any
    k_across: Any
    params: Sequence[Any]
    room: Sequence[Any]
    product: Products
    scale: Array | None


class Sums(NamedTuple):
    """References to the gradients that a comparison adds to.

    Attributes:
        q: ``[P, queries]``; for inner products without the scale of the logits.
        k: ``[keys, P]``; for inner products without ``Comparison.factor``.
        params: of shapes ``Comparison.gradient_shapes``; empty if not wanted.
    """

    q: Any
    k: Any
    params: Sequence[Any]


class Comparison:
    """How the logits of a block are computed; this base class is for inner products."""

    #: Whether the backward pass reads queries as ``[P, queries]``, as the forward does.
    queries_across = False

    def __init__(self, inputs: AttentionInputs):
        """Makes the comparison for these inputs."""
        self.inputs = inputs

    @property
    def dtype(self) -> DTypeLike:
        """Type of queries and keys in the kernel."""
        key, query = self.inputs.key.dtype, self.inputs.query.dtype
        return query if key == query else f32

    @property
    def query(self) -> Array:
        """The query for the kernel: scaled, unless scaling would round it."""
        inputs = self.inputs
        exact = not scaling_rounds(inputs)
        return (scaled_query(inputs) if exact else inputs.query).astype(self.dtype)

    @property
    def factor(self) -> float:
        """The constant scale of logits if queries are not scaled, else 1."""
        return self.inputs.logit_scale if scaling_rounds(self.inputs) else 1.0

    def _scaled(self, z: Array, scale: float | Array | None) -> Array:
        if self.factor != 1:
            scale = self.factor if scale is None else self.factor * scale
        return _times(z, scale)

    def bound(self) -> Array | None:
        """An upper bound of the absolute value of all logits; None: unknown."""
        inputs = self.inputs
        capped = _capped(inputs)
        if capped is not None or inputs.modifiers:
            return capped
        norms = [
            jnp.square(x.astype(f32)).sum(-1).max(1, initial=0)
            for x in (scaled_query(inputs, f32), inputs.key)
        ]
        queries = norms[0].reshape(*norms[1].shape, -1)
        return jnp.sqrt((queries * norms[1][..., None]).max(initial=0))

    def params(self, place: Callable[..., Place]) -> list[Reader]:
        """Readers of the parameters of the score."""
        return []

    def room(self, blocks: Blocks, of: str, spare: int = 0) -> list[pl.MemoryRef]:
        """Scratch memory of the comparison; it may use ``spare`` bytes more."""
        return []

    def logits(self, given: Given, part: Part) -> Array:
        """Logits of a part of the keys, ``[keys, queries]``."""
        z = given.product(given.k[part.keys, :], given.q[...])
        return self._scaled(z, given.scale)

    def logits_again(self, given: Given, part: Part) -> Array:
        """As ``logits``, in the backward pass: see ``queries_across``."""
        z = given.product(given.k[part.keys, :], given.q[...], NT)
        return self._scaled(z, given.scale)

    def gradient_shapes(self, blocks: Blocks) -> list[tuple[int, ...]]:
        """Shapes of the sums that ``pull`` adds for the parameters of one head."""
        return []

    def pull(self, d: Array, given: Given, part: Part, sums: Sums) -> None:
        """Adds the inputs' gradients for a gradient ``d [keys, queries]`` of logits."""
        sums.q[...] += given.product(given.k_across[:, part.keys], d)
        sums.k[part.keys, :] += given.product(_times(d, given.scale), given.q[...])

    def finish_gradients(self, found: Sequence[Array]) -> PyTree:
        """Sums ``[B, N, *shape]`` as gradients ``[B, N, 1, 1, *payload]``."""
        raise NotImplementedError("an inner product has no parameters")


class _AdditiveComparison(Comparison):
    @property
    def dtype(self) -> DTypeLike:
        return f32

    def _weight(self) -> Array:
        """``[B or 1, N or 1, P]``."""
        (weight,) = jax.tree.leaves(self.inputs.pair_params)
        return weight.reshape(*weight.shape[:2], -1).astype(f32)

    def bound(self) -> Array | None:
        capped = _capped(self.inputs)
        if capped is not None or self.inputs.modifiers:
            return capped
        return jnp.abs(self._weight()).sum(-1).max(initial=0)

    def params(self, place: Callable[..., Place]) -> list[Reader]:
        # Repeated in each lane, not in scalar memory, with which the compiler's static
        # profile fails.
        weight = self._weight()[..., None]
        return [_by_head(jnp.broadcast_to(weight, (*weight.shape[:3], _LANES)), place)]

    def room(self, blocks: Blocks, of: str, spare: int = 0) -> list[pl.MemoryRef]:
        shapes = [(blocks.chunk, blocks.q)]
        if of == "backward":
            shapes.append((_UNITS * blocks.chunk, _width(blocks.q)))
            # Spare memory stores tanh of some units from the logits for the gradients.
            kept = min(self.inputs.sizes.P, spare // (4 * blocks.chunk * blocks.q))
            shapes += [(kept * blocks.chunk, blocks.q)] * (kept > 0)
        return [pltpu.VMEM(shape, f32) for shape in shapes]

    def logits(self, given: Given, part: Part) -> Array:
        (weight,), (z, *_), q, k = given.params, given.room, given.q, given.k
        tiles, step = _tiles(q), math.gcd(_COMPARED, part.size)
        tanh, kept = _tanh_of(given.room)

        def some(i: Array, _: None) -> None:
            key = k[pl.ds(part.first + i * step, step), :]
            totals = [jnp.zeros((step, _width(q.shape[1])), f32) for _ in tiles]
            for p in range(weight.shape[0]):
                unit = slice(p, p + 1)
                for n, tile in enumerate(tiles):
                    t = jnp.tanh(key[:, unit] + q[unit, tile])
                    totals[n] += weight[unit, : t.shape[1]] * t
                    if p < kept:
                        tanh[pl.ds(p * part.size + i * step, step), tile] = t
            for tile, total in zip(tiles, totals, strict=True):
                z[pl.ds(i * step, step), tile] = total

        _loop(part.size // step, some, None)
        return z[...]

    queries_across = True
    logits_again = logits

    def gradient_shapes(self, blocks: Blocks) -> list[tuple[int, ...]]:
        (weight,) = jax.tree.leaves(self.inputs.pair_params)
        return [(weight.shape[-1], _width(blocks.q))]

    def pull(self, d: Array, given: Given, part: Part, sums: Sums) -> None:
        (weight,), (z, *_) = given.params, given.room
        z[...] = d
        row = weight[:, :1].T
        every = range(row.shape[1])
        for first in every[::_UNITS]:
            self._pull_units(every[first : first + _UNITS], row, given, part, sums)

    def _pull_units(
        self, units: Sequence[int], row: Array, given: Given, part: Part, sums: Sums
    ) -> None:
        """Adds the gradients of some hidden units, computed together."""
        (weight,), (z, wide, *_), q, k = given.params, given.room, given.q, given.k
        tiles, width = _tiles(q), _width(q.shape[1])
        tanh, kept = _tanh_of(given.room)
        step = math.gcd(_PULLED, part.size)
        finished = math.gcd(_FINISHED, part.size)
        own = lax.broadcasted_iota(jnp.int32, row.shape, 1)

        def some(i: Array, found: list[Any]) -> list[Any]:
            here, more = pl.ds(i * step, step), []
            d = [z[here, tile] for tile in tiles]
            for n, p in enumerate(units):
                (d_query, d_weight), d_key = found[n], jnp.zeros((step, width), f32)
                d_query = list(d_query)
                for m, tile in enumerate(tiles):
                    if p < kept:
                        t = tanh[pl.ds(p * part.size + i * step, step), tile]
                    else:
                        key = k[pl.ds(part.first + i * step, step), p : p + 1]
                        t = jnp.tanh(key + q[p : p + 1, tile])
                    weighted = d[m] * t
                    inner = d[m] - weighted * t
                    d_key += inner
                    d_query[m] += eighths(inner)
                    d_weight += eighths(weighted)
                wide[pl.ds(n * part.size + i * step, step), :] = d_key
                more.append((d_query, d_weight))
            return more

        def finish(i: Array, _: None) -> None:
            d_key = jnp.zeros((finished, row.shape[1]), f32)
            for n, p in enumerate(units):
                here = pl.ds(n * part.size + i * finished, finished)
                d_key = jnp.where(own == p, wide[here, :].sum(1, keepdims=True), d_key)
            here = pl.ds(part.first + i * finished, finished)
            sums.k[here, :] += d_key * row

        def eighths(x: Array) -> Array:
            return x.reshape(-1, 8, width).sum(0)

        zero = jnp.zeros((8, width), f32)
        start = [([zero] * len(tiles), zero)] * len(units)
        found = _loop(part.size // step, some, start)
        _loop(part.size // finished, finish, None)
        for p, (d_query, d_weight) in zip(units, found, strict=True):
            unit = slice(p, p + 1)
            for tile, each in zip(tiles, d_query, strict=True):
                sums.q[unit, tile] += each.sum(0, keepdims=True) * weight[unit, :width]
            for ref in sums.params:
                ref[unit, :] += d_weight.sum(0, keepdims=True)

    def finish_gradients(self, found: Sequence[Array]) -> PyTree:
        structure = jax.tree.structure(self.inputs.pair_params)
        return jax.tree.unflatten(structure, [found[0].sum(-1)])


class _MlpComparison(Comparison):
    @property
    def dtype(self) -> DTypeLike:
        return f32

    def _columns(self) -> list[Array]:
        """The parameters as ``[B or 1, N or 1, rows, cols]``.

        Matrices are transposed, vectors are columns.
        """

        def column(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], *x.shape[4:]).astype(f32)
            return x.swapaxes(2, 3) if x.ndim == 4 else x[..., None]

        return [column(x) for x in jax.tree.leaves(self.inputs.pair_params)]

    def bound(self) -> Array | None:
        return _capped(self.inputs)

    def params(self, place: Callable[..., Place]) -> list[Reader]:
        return [_by_head(x, place) for x in self._columns()]

    def room(self, blocks: Blocks, of: str, spare: int = 0) -> list[pl.MemoryRef]:
        return [pltpu.VMEM((blocks.chunk, blocks.q), f32)]

    def one_key(
        self, query: Array, key: Array, params: Sequence[Array], product: Products
    ) -> Array:
        """Logits of one key, ``[P, queries], [P, 1] -> [1, queries]``."""
        activation = unwrapped(self.inputs.score).activation
        *hidden, weight = params
        x = activation(query + key)
        for matrix, bias in zip(hidden[::2], hidden[1::2], strict=True):
            x = activation(product(matrix, x) + bias)
        return (weight * x).sum(0, keepdims=True)

    def logits(self, given: Given, part: Part) -> Array:
        (z,), q, k = given.room, given.q, given.k
        product = given.product._replace(dtype=f32)

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
        product = given.product._replace(dtype=f32)
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

        start = jnp.zeros(q.shape, f32), [jnp.zeros_like(x) for x in values]
        start = start if sums.params else (start[0], [])
        d_query, d_params = _loop(part.size, one, start)
        sums.q[...] += d_query
        for ref, found in zip(sums.params, d_params, strict=True):
            ref[...] += found

    def finish_gradients(self, found: Sequence[Array]) -> PyTree:
        leaves, structure = jax.tree.flatten(self.inputs.pair_params)
        # Undoes ``_columns``: matrices are transposed, vectors are columns.
        found = [
            x.swapaxes(2, 3) if leaf.ndim == 6 else x[..., 0]
            for x, leaf in zip(found, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, found)


def _times(x: Array, scale: float | Array | None) -> Array:
    return x if scale is None else x * scale


def _loop(count: int, body: Callable[[Array, PyTree], PyTree], start: PyTree) -> PyTree:
    """``lax.fori_loop`` from 0, with an int32 counter also in x64 mode."""
    with jax.enable_x64(False):
        return lax.fori_loop(0, count, body, start)


def _tanh_of(room: Sequence[Any]) -> tuple[Any, int]:
    """The memory with stored tanh of some units, or None; and the number of units."""
    z, *more = room
    return (more[1], more[1].shape[0] // z.shape[0]) if more[1:] else (None, 0)


def _width(queries: int) -> int:
    """Width of the tiles that a block of ``queries`` queries is divided into."""
    return math.gcd(queries, _LANES)


def _tiles(q: Any) -> list[slice]:
    """Slices of the tiles of queries, ``[P, queries]``."""
    width = _width(q.shape[1])
    return [slice(i, i + width) for i in range(0, q.shape[1], width)]


def _by_head(x: Array, place: Callable[..., Place]) -> Reader:
    """A reader of ``[B or 1, N or 1, rows, columns]``: whole, for the step's head."""

    def index(*index: Any) -> tuple[int | Array, ...]:
        at = place(*index)
        example = at.example if x.shape[0] > 1 else 0
        return example, at.head if x.shape[1] > 1 else 0, 0, 0

    spec = pl.BlockSpec((None, None, *x.shape[2:]), index)
    return Reader(x, spec, lambda ref, *_: ref[...])


def comparison(inputs: AttentionInputs) -> Comparison:
    """The comparison for the score of these inputs."""
    kind = comparison_class(inputs.score)
    if kind is Additive:
        return _AdditiveComparison(inputs)
    return _MlpComparison(inputs) if kind is Mlp else Comparison(inputs)


def _capped(inputs: AttentionInputs) -> Array | None:
    """The bound by a soft cap, if that is the last modifier; else None."""
    # Not for subclasses, which may do something else.
    if not (inputs.modifiers and exactly(inputs.modifiers[-1], SoftCap)):
        return None
    (cap,) = inputs.modifier_operands[-1]
    return jnp.abs(cap).max(initial=0).astype(f32)
