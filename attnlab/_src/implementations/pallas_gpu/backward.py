"""The backward pass: a kernel for queries, and one for keys and values.

Each thread block owns the gradients that it writes, so that no sum depends on an order:
results are the same in every run. The logits are computed twice for that.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab._src.implementations.pallas_gpu.blocks import ROWS, Blocks
from attnlab._src.implementations.pallas_gpu.call import (
    BY_COLUMN,
    BY_ROW,
    LOG2_E,
    TILE,
    Products,
    Ring,
    along,
    call,
    f32,
    fetch,
    full,
    load,
    shared,
    split,
    whole_tiles,
)
from attnlab._src.implementations.pallas_gpu.logits import Rules
from attnlab._src.implementations.pallas_gpu.operands import Place
from attnlab._src.implementations.pallas_gpu.steps import Steps
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.sizes import fit
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import Array, AttentionInputs, PyTree


class Backward:
    """The backward pass of one call."""

    def __init__(
        self,
        interpret: Any,
        want: AttentionInputs,
        inputs: AttentionInputs,
        output: Array,
        lse: Array,
        d_output: Array,
        d_lse: Array | None,
    ):
        """See ``Implementation.backward``.

        Args:
            interpret: parameters of the interpreter; None: compile.
            want: which of the inputs need a gradient.
            inputs: the canonical record.
            output: ``[B, T, N, D]``.
            lse: ``[B, T, N]``.
            d_output: ``[B, T, N, D]``.
            d_lse: ``[B, T, N]``, or None.
        """
        self.inputs, self.want, self.interpret = inputs, want, interpret
        self.sizes, self.dtype = inputs.sizes, inputs.query.dtype
        self.group = self.sizes.N // self.sizes.K
        self.product = Products(self.dtype, bool(interpret))
        # Rounded as in the products, so that gradients of a row's logits sum to zero.
        d_output = d_output.astype(self.dtype)
        delta = (d_output.astype(f32) * output).sum(-1)
        if d_lse is not None:
            delta = delta - d_lse
        # For a query that sees nothing: exp2(logits - inf) = 0.
        shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
        if not inputs.modifiers:  # see ``Rules.to_base_2``
            shift = shift * LOG2_E
        self._by_query = shift.swapaxes(1, 2), delta.swapaxes(1, 2)
        self._kept_scale = 1 / (1 - inputs.dropout_rate)
        sides = inputs.query, d_output, inputs.key, inputs.value
        self.sides = [whole_tiles(x) for x in sides]
        self.width, self.depth = (self.sides[n].shape[-1] for n in (0, 1))
        leaves = jax.tree.leaves(inputs.modifier_operands)
        wanted = jax.tree.leaves(want.modifier_operands)
        learned = [n for n, on in enumerate(wanted) if on]
        #: Numbers of operands of modifiers whose gradients each pass sums.
        self.along_keys = [n for n in learned if leaves[n].shape[3] > 1]
        self.others = [n for n in learned if leaves[n].shape[3] == 1]

    def by_query(self, rows: int) -> list[Array]:
        """Log-sum-exp, see ``Rules.to_base_2``, and delta: ``[B, N, rows]``, padded."""
        pad = [(0, 0), (0, 0), (0, rows - self.sizes.T)]
        shift, delta = self._by_query
        return [jnp.pad(shift, pad, constant_values=jnp.inf), jnp.pad(delta, pad)]

    def d_logits(
        self,
        rules: Rules,
        given: Sequence[Any],
        at: Place,
        masked: bool,
        z: Array,
        d_weights: Callable[[], Array],
        by_query: Sequence[Callable[[], Array]],
        learned: Sequence[int],
    ) -> tuple[Array, Array, dict[int, Array]]:
        """Weights after dropout, and the gradients of a tile.

        Args:
            rules: makes the logits.
            given: references to its arrays.
            at: the tile.
            masked: whether some pair may be hidden.
            z: inner products.
            d_weights: computes the gradients of the weights.
            by_query: yield, as tiles, log-sum-exp, and what is subtracted from the
                gradients of weights. They are called late, as each takes registers.
            learned: numbers of the operands of modifiers whose gradients are wanted.

        Returns:
            The weights, gradients of the scaled inner products, and those of operands
            of modifiers, by number.
        """
        z, pull = rules.logits_again(z, at, given, masked, learned)
        shift, delta = by_query
        p = jnp.exp2((z - shift()) * rules.to_base_2)
        d = d_weights()
        keep, dropped = rules.kept(at, given), p
        if keep is not None:
            d = jnp.where(keep, d * self._kept_scale, 0.0)
            dropped = jnp.where(keep, p, 0.0)
        d, more = pull(p * (d - delta()))
        return dropped, d, more

    def query(self, blocks: Blocks) -> tuple[Array, dict[int, Array]]:
        """The gradient of the query, and of operands of modifiers.

        Returns:
            ``[B, T, N, P]``, and ``[B, N, T]`` for each of ``others``.
        """
        s, many, dtype = self.sizes, blocks.warpgroups, self.dtype
        sizes = blocks.rows, blocks.columns
        plan = fit(plan_of(self.inputs, sizes, cols=False), sizes)
        tiles = Tiles(self.inputs, plan)
        steps, rules = Steps(plan.rows), Rules(tiles)

        def kernel(arrays: Any, results: Any, scratch: Any) -> None:
            (q, d_o, k, v), by_query, walk, given = arrays
            queries, above, there, room, ring = scratch
            ring = Ring(ring)
            head, row, example = map(lax.axis_index, ("head", "row", "example"))

            def copy() -> None:
                from_head = lax.div(head, jnp.int32(self.group))
                sources = [x.at[example, :, from_head] for x in (k, v)]
                steps.copy(walk, (example, head, row), ring, sources, jnp.int32(0))

            def compute(own: Array) -> None:
                query, d_output, *mine = (x.at[own] for x in (queries, above, *room))
                start = row * blocks.rows + own * ROWS
                span = pl.ds(start, ROWS)
                fetch(
                    [x.at[example, span, head] for x in (q, d_o)],
                    (query, d_output),
                    [there.at[n * many + own] for n in range(2)],
                )
                own_rows = [load(x.at[example, head, span], BY_ROW) for x in by_query]

                def step(block: Array, masked: bool, state: Any) -> Any:
                    number, total, *sums = state
                    first = block * blocks.columns
                    at = Place(example, head, start, first, (ROWS, blocks.columns))
                    key = ring.wait(0, number)
                    z = self.product(query, key.transpose((1, 0)))

                    def d_weights() -> Array:
                        value = ring.wait(1, number)
                        d = self.product(d_output, value.transpose((1, 0)))
                        ring.release(1, number)
                        return d

                    tiles = [functools.partial(along, x, at.shape, 0) for x in own_rows]
                    _, d, more = self.d_logits(
                        rules, given, at, masked, z, d_weights, tiles, self.others
                    )
                    total = self.product.add(total, d, key, mine)
                    ring.release(0, number)
                    found = (more[n].sum(1) for n in self.others)
                    sums = map(jnp.add, sums, found)
                    return number + 1, total, *sums

                zeros = [full((ROWS,), 0, BY_ROW) for _ in self.others]
                state = jnp.int32(0), full((ROWS, self.width), 0, TILE), *zeros
                state = steps.over(walk, (example, head, row), step, state)
                _, total, *sums = state
                for x, result in zip(sums, results[1:], strict=True):
                    result[example, head, span] = x
                total = total * self.inputs.logit_scale
                if direct:
                    results[0][example, span, head] = total
                    return
                query[...] = total.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query, results[0].at[example, span, head])
                plgpu.wait_smem_to_gmem(0)

            split(many, compute, copy, self.product.interpreted)

        rows = tiles.nq * blocks.rows
        # ``head_scale`` multiplies the gradient later: rounded, it might be lost.
        direct = self.inputs.head_scale is not None
        shape = (s.B, rows, s.N, self.width) if direct else self.sides[0].shape
        found, *sums = call(
            kernel,
            {"example": s.B, "head": s.N, "row": tiles.nq},
            (
                self.sides,
                self.by_query(rows),
                steps.arrays,
                rules.arrays,
            ),
            [
                jax.ShapeDtypeStruct(shape, f32 if direct else dtype),
                *(jax.ShapeDtypeStruct((s.B, s.N, rows), f32) for _ in self.others),
            ],
            self._memory(blocks),
            warpgroups=many,
            name="attnlab_backward_query",
            interpret=self.interpret,
        )
        return found[:, : s.T, :, : s.P], dict(
            zip(self.others, (x[..., : s.T] for x in sums), strict=True)
        )

    def key(self, blocks: Blocks) -> tuple[Array, Array, dict[int, Array]]:
        """Gradients of key and value, and of operands of modifiers.

        Returns:
            ``[B, S, K, P]``, ``[B, S, K, D]``, and ``[B, N, S]`` for each of
            ``along_keys``.
        """
        s, many, dtype = self.sizes, blocks.warpgroups, self.dtype
        sizes = blocks.columns, blocks.rows
        plan = fit(plan_of(self.inputs, sizes, cols=True), sizes)
        assert plan.cols is not None
        tiles = Tiles(self.inputs, plan)
        steps, rules = Steps(plan.cols), Rules(tiles, transposed=True)

        def kernel(arrays: Any, results: Any, scratch: Any) -> None:
            (q, d_o, k, v), by_query, walk, given = arrays
            keys, values, there, room, ring = scratch
            ring = Ring(ring)
            to_head, column, example = map(
                lax.axis_index, ("head", "column", "example")
            )

            def members(each: Callable[[Array, PyTree], PyTree], state: PyTree) -> Any:
                """Runs ``each(head, state)`` for the heads that share these keys."""
                first = to_head * self.group
                if self.group == 1:
                    return each(first, state)
                return lax.fori_loop(first, first + self.group, each, state)

            def copy() -> None:
                def member(head: Array, number: Array) -> Array:
                    sources = [x.at[example, :, head] for x in (q, d_o)]
                    at = example, head, column
                    return steps.copy(walk, at, ring, sources, number)

                members(member, jnp.int32(0))

            def compute(own: Array) -> None:
                key, value, *mine = (x.at[own] for x in (keys, values, *room))
                start = column * blocks.rows + own * ROWS
                span = pl.ds(start, ROWS)
                fetch(
                    [x.at[example, span, to_head] for x in (k, v)],
                    (key, value),
                    [there.at[n * many + own] for n in range(2)],
                )

                def step(head: Array, block: Array, masked: bool, state: Any) -> Any:
                    number, d_key, d_value, *sums = state
                    first = block * blocks.columns
                    at = Place(example, head, first, start, (ROWS, blocks.columns))
                    queries = pl.ds(first, blocks.columns)

                    def tile(x: Any) -> Array:
                        found = load(x.at[example, head, queries], BY_COLUMN)
                        return along(found, at.shape, 1)

                    query, above = ring.wait(0, number), ring.wait(1, number)
                    z = self.product(key, query.transpose((1, 0)))
                    p, d, more = self.d_logits(
                        rules,
                        given,
                        at,
                        masked,
                        z,
                        lambda: self.product(value, above.transpose((1, 0))),
                        [functools.partial(tile, x) for x in by_query],
                        self.along_keys,
                    )
                    d_value = self.product.add(d_value, p, above, mine)
                    ring.release(1, number)
                    d = rules.scale_again(d, at, given)
                    d_key = self.product.add(d_key, d, query, mine)
                    ring.release(0, number)
                    found = (more[n].sum(1) for n in self.along_keys)
                    sums = map(jnp.add, sums, found)
                    return number + 1, d_key, d_value, *sums

                def member(head: Array, state: Any) -> Any:
                    zeros = [full((ROWS,), 0, BY_ROW) for _ in self.along_keys]
                    found = steps.over(
                        walk,
                        (example, head, column),
                        functools.partial(step, head),
                        (*state, *zeros),
                    )
                    for x, result in zip(found[3:], results[2:], strict=True):
                        result[example, head, span] = x
                    return found[:3]

                state = (
                    jnp.int32(0),
                    full((ROWS, self.width), 0, TILE),
                    full((ROWS, self.depth), 0, TILE),
                )
                _, d_key, d_value = members(member, state)
                found = d_key * self.inputs.logit_scale, d_value * self._kept_scale
                for to, x, result in zip((key, value), found, results[:2], strict=True):
                    to[...] = x.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(to, result.at[example, span, to_head])
                plgpu.wait_smem_to_gmem(0)

            split(many, compute, copy, self.product.interpreted)

        cols = tiles.nk * blocks.rows
        d_key, d_value, *sums = call(
            kernel,
            {"example": s.B, "head": s.K, "column": tiles.nk},
            (
                self.sides,
                self.by_query(tiles.nq * blocks.columns),
                steps.arrays,
                rules.arrays,
            ),
            [
                *(jax.ShapeDtypeStruct(x.shape, dtype) for x in self.sides[2:]),
                *(jax.ShapeDtypeStruct((s.B, s.N, cols), f32) for _ in self.along_keys),
            ],
            self._memory(blocks),
            warpgroups=many,
            name="attnlab_backward_key",
            interpret=self.interpret,
        )
        more = dict(zip(self.along_keys, (x[..., : s.S] for x in sums), strict=True))
        return d_key[:, : s.S, :, : s.P], d_value[:, : s.S, :, : s.D], more

    def _memory(self, blocks: Blocks) -> list[Any]:
        """Scratch memory: two arrays of all warpgroups, their barriers, room, ring."""
        many, widths = blocks.warpgroups, (self.width, self.depth)
        return [
            *(
                shared(many, ROWS, n, dtype=self.dtype, lanes=blocks.lanes)
                for n in widths
            ),
            plgpu.Barrier(num_barriers=2 * many),
            self.product.room(blocks),
            Ring.scratch(blocks, widths, self.dtype),
        ]

    def run(self, of_query: Blocks, of_key: Blocks) -> list[Array | None]:
        """See ``Implementation.backward``."""
        inputs, want = self.inputs, self.want
        found, sums = {}, {}
        if want.query or self.others:
            found["query"], sums = self.query(of_query)
        if want.key or want.value or self.along_keys:
            found["key"], found["value"], more = self.key(of_key)
            sums |= more
        leaves, structure = jax.tree.flatten(inputs.modifier_operands)
        each = [_like(sums[n], x) if n in sums else None for n, x in enumerate(leaves)]
        found["modifier_operands"] = jax.tree.unflatten(structure, each)
        gradients = inputs.gradients(**found)
        wanted = jax.tree.leaves(want)
        return [x if on else None for x, on in zip(gradients, wanted, strict=True)]


def _like(x: Array, operand: Array) -> Array:
    """``[B, N, T or S]``, summed over all axes that an operand lacks."""
    x = x[:, :, None, :] if operand.shape[3] > 1 else x[..., None]
    axes = [n for n in range(4) if operand.shape[n] == 1]
    return x.sum(axes, keepdims=True).astype(operand.dtype)
