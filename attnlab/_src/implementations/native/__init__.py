"""A C++ kernel for CPUs, called through XLA's foreign function interface.

It walks the same plan as ``tiled``; its vectors run along the queries
(``src/kernel.cc``). Python describes a call as buffers and a short program of integers
(``program.py``).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from attnlab._src.implementations.native import load
from attnlab._src.implementations.native.listed import (
    ENOUGH_QUERIES,
    keys_listed,
    lists_of,
    rows_of,
)
from attnlab._src.implementations.native.program import (
    FLOATS,
    MOST_MODIFIERS,
    Buffers,
    header,
    mask_program,
    modifier_code,
    modifier_gradient,
    modifier_operand,
    score_code,
    unknown,
)
from attnlab._src.implementations.tile import may_round
from attnlab._src.masks.base import Mask
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.operands import cut
from attnlab._src.scores.pairwise import Mlp
from attnlab._src.scores.projected import comparison_class, unwrapped
from attnlab._src.types import (
    Array,
    AttentionInputs,
    Implementation,
    Plan,
    PyTree,
    Tile,
)
from attnlab._src.types import (
    skeleton as skeleton,
)

#: Number of keys in a block.
_BLOCK_K = 64
#: Number of queries in a block: the greatest that yields at least ``_UNITS`` blocks of
#: queries, else the least.
_BLOCKS_Q = (128, 64, 32)
_UNITS = 16
#: Least number of keys in a slice, and greatest number of slices of a backward pass.
_SLICE, _MOST_SLICES = 512, 8
#: The number of the pass in which each query has a list of its own (``src/problem.h``).
_LISTED = 2
#: Greatest size of the query gradients of all slices, in bytes, if there are several.
_MOST_SCRATCH = 2**30
#: Up to so many queries, vectors run along the keys; and greatest number of slices of
#: keys in such a forward pass.
_FEW_QUERIES, _MOST_FORWARD_SLICES = 4, 64
#: Number of keys for which a mask that the kernel does not know is evaluated at once.
_BITS_BLOCK = 512
#: Greatest memory of a call beyond O(T + S), in bytes: for bits of masks that the
#: kernel does not know, and for gradients of a bias that heads or examples share, which
#: are stored for each of them.
_MOST_BYTES = 2**30


class Native(Implementation):
    """A C++ kernel on all cores; memory O(T + S); dead blocks are skipped."""

    name = "native"
    platforms = ("cpu",)
    exportable = False
    reads_raw = True

    def unsupported(self, inputs: AttentionInputs) -> tuple[str, ...]:
        """See :class:`attnlab.extend.Implementation`."""
        reasons = []
        missing = load.why_not()
        if missing is not None:
            reasons.append(missing)
        for x in (inputs.query, inputs.value):
            if x.dtype not in FLOATS:
                reasons.append(f"it computes in float32, not in {x.dtype}")
                break
        if score_code(inputs.score) is None:
            reasons.append(f"it does not know the score {type(inputs.score).__name__}")
        reasons += [
            f"it does not know the modifier {type(modifier).__name__}"
            for modifier in inputs.modifiers
            if modifier_code(modifier) is None
        ]
        if len(inputs.modifiers) > MOST_MODIFIERS:
            reasons.append(f"it takes at most {MOST_MODIFIERS} modifiers")
        s = inputs.sizes
        pairs = s.B * s.N * s.T * s.S
        if unknown(inputs.mask) * pairs / 8 > _MOST_BYTES:
            reasons.append(
                "bits of the mask, which it does not know, need too much memory"
            )
        for modifier, own in zip(
            inputs.modifiers, inputs.modifier_operands, strict=True
        ):
            over_pairs = min(own[0].shape[2:4], default=0) > 1 if own else False
            shared = over_pairs and own[0].shape[0] * own[0].shape[1] < s.B * s.N
            if shared and 4 * pairs > _MOST_BYTES:
                name = type(modifier).__name__
                reasons.append(
                    f"the gradient of the {name} that all share needs too much"
                )
        return tuple(reasons)

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        s = inputs.sizes
        sizes, block_k = _BLOCKS_Q, _BLOCK_K
        if (multiples := inputs.mask.block_multiples) is not None:
            of_queries, of_keys = multiples
            fit = (n for n in (*_BLOCKS_Q, ENOUGH_QUERIES) if of_queries % n == 0)
            sizes = tuple(fit) or _BLOCKS_Q
            fit = (n for n in (_BLOCK_K, 32, 16) if of_keys % n == 0)
            block_k = next(fit, _BLOCK_K)
        size = next((n for n in sizes if s.B * s.N * -(-s.T // n) >= _UNITS), sizes[-1])
        return max(min(size, s.T), 1), max(min(block_k, s.S), 1)

    def keys_listed(self, inputs: AttentionInputs) -> int | None:
        """See :class:`attnlab.extend.Implementation`."""
        return keys_listed(inputs)

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        s = inputs.sizes
        call = _Call(inputs, rows_of(inputs, self.block_sizes(inputs)))
        output = jax.ShapeDtypeStruct((s.B, s.T, s.N, s.D), jnp.float32)
        lse = jax.ShapeDtypeStruct((s.B, s.T, s.N), jnp.float32)
        few = _few_queries(inputs)
        slices = min(-(-s.S // _SLICE), _MOST_FORWARD_SLICES) if few else 0
        parts = jax.ShapeDtypeStruct((slices, s.B, s.T, s.N, s.D + 2), jnp.float32)
        output, lse, _ = call.run(load.FORWARD, (output, lse, parts), slices=slices)
        return output, lse

    def backward(
        self,
        inputs: AttentionInputs,
        output: Array,
        lse: Array,
        d_output: Array,
        d_lse: Array | None,
        wanted: Sequence[bool],
    ) -> list[Array | None]:
        """See :class:`attnlab.extend.Implementation`."""
        s = inputs.sizes
        want = jax.tree.unflatten(jax.tree.structure(inputs), list(wanted))
        plan = rows_of(inputs, self.block_sizes(inputs))
        apart = s.B if _few_queries(inputs) else s.B * s.K
        slices = max(min(-(-s.S // _SLICE), -(-_UNITS // apart), _MOST_SLICES), 1)
        rows = -(-s.T // plan.block_q)
        kept = math.ceil(plan.block_q / 32) * 32 * math.ceil(s.P / 8) * 8
        scratch = max(4 * s.B * s.N * rows * kept, 1)
        slices = max(min(slices, _MOST_SCRATCH // scratch), 1)

        results: list[jax.ShapeDtypeStruct] = []

        def result(shape: tuple[int, ...], dtype: DTypeLike, on: bool = True) -> int:
            results.append(jax.ShapeDtypeStruct(shape if on else (0,), dtype))
            return len(results) - 1

        narrow, wide = inputs.query.dtype, inputs.accumulation_dtype
        query_type = narrow if inputs.head_scale is None else wide
        result((s.B, s.T, s.N, s.P), query_type, want.query)
        result((s.B, s.S, s.K, s.P), inputs.key.dtype, want.key)
        result((s.B, s.S, s.K, s.D), inputs.value.dtype, want.value)
        # Scratch of the kernel: query gradients of each slice, and sums of rows.
        result((slices, s.B, s.N, rows, kept), jnp.float32, want.query)
        result((s.B, s.T, s.N), jnp.float32)
        params = jax.tree.leaves(inputs.pair_params)
        want_params = any(jax.tree.leaves(want.pair_params))
        places = [
            result((slices, s.B, s.N, *x.shape[4:]), jnp.float32, want_params)
            for x in params
        ]
        modifier_places = []
        for modifier, (operand,), (on,) in zip(
            inputs.modifiers,
            inputs.modifier_operands,
            want.modifier_operands,
            strict=True,
        ):
            if not on:
                modifier_places.append(-1)
                continue
            x = jax.eval_shape(lambda x, m=modifier: modifier_operand(m, x), operand)
            apart = slices if x.shape[3] == 1 else 1
            shape = (apart, s.B, s.N, *x.shape[2:])
            modifier_places.append(result(shape, jnp.float32))

        d_output = d_output.astype(inputs.accumulation_dtype)
        call = _Call(inputs, plan, output, lse, d_output)
        found = call.run(
            load.BACKWARD,
            tuple(results),
            slices=slices,
            wanted=want.query
            + 2 * want.key
            + 4 * want.value
            + 8 * want_params
            + 16 * any(place >= 0 for place in modifier_places),
            param_gradient=places[0] if places else -1,
            d_lse=-1 if d_lse is None else call.add(d_lse),
            modifier_gradients=modifier_places,
        )

        d_params = [
            _to_shape(found[place].sum(0), x)
            for place, x in zip(places, params, strict=True)
            if want_params
        ]
        d_modifiers = tuple(
            (
                None
                if place < 0
                else modifier_gradient(modifier, _sum(found[place], operand), operand),
            )
            for place, modifier, (operand,) in zip(
                modifier_places,
                inputs.modifiers,
                inputs.modifier_operands,
                strict=True,
            )
        )
        gradients: dict[str, PyTree] = {
            "query": found[0] if want.query else None,
            "key": found[1] if want.key else None,
            "value": found[2] if want.value else None,
            "modifier_operands": d_modifiers,
        }
        if want_params:
            structure = jax.tree.structure(inputs.pair_params)
            gradients["pair_params"] = jax.tree.unflatten(structure, d_params)
        return inputs.gradients(**gradients)


def _sum(x: Array, operand: Array) -> Array:
    """Sums ``[slices or 1, B, N, ...]`` to the batch and head axes of the operand."""
    x = x.sum(0)
    axes = tuple(a for a in (0, 1) if operand.shape[a] == 1)
    return x.sum(axes, keepdims=True)


def _to_shape(x: Array, operand: Array) -> Array:
    """Sums ``[B, N, *payload]`` to the shape of a pair parameter."""
    return _sum(x[None], operand).reshape(operand.shape)


class _Call:
    """A call of the kernel: its buffers and its program."""

    def __init__(self, inputs: AttentionInputs, plan: Plan, *backward: Array):
        self.inputs, self.plan = inputs, plan
        rows = plan.rows
        self.buffers = Buffers(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.query_positions,
            inputs.key_positions,
            *(jnp.asarray(x, jnp.int32) for x in (*rows.full, *rows.partial)),
            *backward,
        )
        self.add = self.buffers.add

    def run(
        self,
        name: str,
        results: tuple[jax.ShapeDtypeStruct, ...],
        *,
        slices: int,
        wanted: int = 0,
        param_gradient: int = -1,
        d_lse: int = -1,
        modifier_gradients: Sequence[int] = (),
    ) -> Any:
        """Calls the kernel; ``Problem`` in ``src/problem.h`` documents the program."""
        inputs, plan = self.inputs, self.plan
        code = score_code(inputs.score)
        assert code is not None
        mask, operands = inputs.mask, inputs.mask_operands
        which, lists = int(_few_queries(inputs)), (-1, -1)
        if (listed := lists_of(inputs)) is not None:
            which, lists = _LISTED, (self.add(listed.lists), listed.key_block)
            mask, operands = listed.mask, listed.operands
        params = [
            self.add(x.astype(jnp.float32)) for x in jax.tree.leaves(inputs.pair_params)
        ]
        words, below, scale = -1, -1, 1.0
        if inputs.dropout_words is not None:
            words = self.add(inputs.dropout_words[0])
            self.add(inputs.dropout_words[1])
            below = round(inputs.dropout_rate * 2**24)
            scale = 1 / (1 - inputs.dropout_rate)
        modifiers: list[int] = []
        places = modifier_gradients or [-1] * len(inputs.modifiers)
        for modifier, (operand,), place in zip(
            inputs.modifiers, inputs.modifier_operands, places, strict=True
        ):
            kind = modifier_code(modifier)
            assert kind is not None
            before, after = getattr(modifier, "reach", (0, 0))
            argument = self.add(modifier_operand(modifier, operand))
            modifiers += [kind, argument, before, after, place]
        scales = inputs.head_scale
        start = header(
            score=code,
            narrow=may_round(inputs),
            kind=which,
            drop_below=below,
            blocks=(plan.block_q, plan.block_k),
            slices=slices,
            wanted=wanted,
            params=params,
            param_gradient=param_gradient,
            words=words,
            d_lse=d_lse,
            head_scale=-1 if scales is None else self.add(scales),
            lists=lists,
            modifiers=modifiers,
        )
        program = [*start, *mask_program(mask, operands, self.buffers, self.bits)]
        call = jax.ffi.ffi_call(name, results)
        return call(
            *self.buffers.arrays,
            program=np.asarray(program, np.int64),
            keep_scale=np.float64(scale),
            logit_scale=np.float64(inputs.logit_scale),
        )

    def bits(self, mask: Mask, operands: PyTree) -> Array:
        """A mask as bits, in words of 32 queries for each key.

        Returns:
            uint32 ``[B or 1, N or 1, T / 32, S]``; only partial blocks are filled.
        """
        inputs, s = self.inputs, self.inputs.sizes
        span = min(_BITS_BLOCK, s.S)
        plan = self.plan
        lo, hi = (jnp.asarray(x) for x in plan.rows.partial)
        # Greatest number of the plan's rows that a word may overlap.
        touched = 31 // plan.block_q + 2
        count = -(-s.T // 32)
        if lo.shape[3] == 0:  # no partial blocks: the bits are not read
            return jnp.zeros((1, 1, count, s.S), jnp.uint32)
        pad = [(0, 0), (0, 0), (0, count * 32 - s.T), (0, 0)]
        q_pos = jnp.pad(inputs.query_positions, pad, constant_values=-1)
        k_pos = inputs.key_positions

        def padded(x: Array) -> Array:
            if x.shape[2] == 1 or s.T == 1:
                return x
            return jnp.pad(x, pad + [(0, 0)] * (x.ndim - 4), mode="edge")

        operands = jax.tree.map(padded, operands)
        leaves = [q_pos, k_pos, lo, *jax.tree.leaves(operands)]
        batch = max(x.shape[0] for x in leaves)
        heads = max(mask.head_count, *(x.shape[1] for x in leaves))
        shift = jnp.arange(32, dtype=jnp.uint32)[:, None]

        def row(index: Array) -> Array:
            b, n, r = index // (heads * count), index // count % heads, index % count

            def block(first: Array, j: Array, words: Array) -> Array:
                k = jnp.clip(first + j * span, 0, s.S - span)
                at = (b, n, r * 32, k), (32, span)
                tile = Tile(cut(q_pos, *at), cut(k_pos, *at), n.astype(jnp.int32))
                mine = jax.tree.map(lambda x: cut(x, *at), operands)
                seen = visible_pairs(mask, tile, mine)
                seen = jnp.broadcast_to(seen, (32, span)).astype(jnp.uint32)
                found = (seen << shift).sum(0, dtype=jnp.uint32)
                return lax.dynamic_update_slice(words, found, (k,))

            def interval(i: Array, words: Array) -> Array:
                place = jnp.minimum(
                    r * 32 // plan.block_q + i % touched, lo.shape[2] - 1
                )
                at = b if lo.shape[0] > 1 else 0, n if lo.shape[1] > 1 else 0, place
                first = lo[at][i // touched] * plan.block_k
                end = hi[at][i // touched] * plan.block_k
                spans = -((first - end) // span)
                return lax.fori_loop(
                    0, spans, lambda j, words: block(first, j, words), words
                )

            start = jnp.zeros((s.S,), jnp.uint32)
            return lax.fori_loop(0, lo.shape[3] * touched, interval, start)

        words = lax.map(row, jnp.arange(batch * heads * count, dtype=jnp.int32))
        return words.reshape(batch, heads, count, s.S)


def _few_queries(inputs: AttentionInputs) -> bool:
    """Whether queries are so few that vectors run along the keys instead."""
    deep = (
        comparison_class(inputs.score) is Mlp
        and len(unwrapped(inputs.score).hidden) > 0
    )
    alike = inputs.key.dtype == inputs.value.dtype
    return inputs.sizes.T <= _FEW_QUERIES and alike and not deep
