"""What a page shows of a mask: its parts as functions, its blocks, its numbers."""

import base64
import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.base import And, Mask, Not, Or
from attnlab._src.masks.graph import layers_at_least
from attnlab._src.masks.per_head import PerHead
from attnlab._src.masks.planning import (
    alone,
    dense_visible,
    index_blocks,
    make_plan,
    reads_head,
    slot_operand,
)
from attnlab._src.types import Array, Plan, PyTree
from attnlab._src.view.javascript import function_of
from attnlab._src.view.operations import NotTranslated

_OPS: dict[type[Mask], str] = {And: "and", Or: "or", PerHead: "head"}
#: Rows of blocks that a page holds at most, over all heads and examples.
_MOST_ROWS = 8192
#: Pairs that are stored where a rule has no translation.
_MOST_PAIRS = 2**24
#: Pairs in partial blocks that are counted one by one, in about a second.
_MOST_COUNTED = 2**27
#: Smallest block of a page: single pairs are computed by the page itself.
_SMALLEST = 64


def content_of(
    mask: Mask, query_length: int, key_length: int, block_size: int | None = None
) -> dict[str, Any]:
    """All that a page needs to draw a mask at any scale, as JSON.

    Args:
        mask: the mask; its arrays must be known.
        query_length: T.
        key_length: S.
        block_size: positions in a block; if not given, at least 64, and as many as
            keep the page small.

    Raises:
        ValueError: if arrays of the mask are traced, or it does not fit the lengths.
    """
    operands, _ = alone(mask, query_length, key_length)
    leaves = jax.tree.leaves(operands)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        raise ValueError(
            "mask: expected known arrays, got traced ones; show it outside"
        )
    operands = jax.tree.map(np.asarray, operands)
    examples = max((x.shape[0] for x in leaves), default=1)
    heads = max([x.shape[1] for x in leaves] + [mask.head_count])
    if any(0 in x.shape[:2] for x in leaves):
        raise ValueError("mask: expected at least one example and one head, got none")
    if block_size is None:
        longest = max(query_length, key_length, 1)
        wanted = longest * examples * heads / _MOST_ROWS
        block_size = max(_SMALLEST, 2 ** math.ceil(math.log2(wanted)))
    plan = make_plan(
        mask,
        operands,
        index_blocks("query", query_length, block_size),
        index_blocks("key", key_length, block_size),
    )
    arrays: list[np.ndarray] = []
    return {
        "text": repr(mask),
        "queries": query_length,
        "keys": key_length,
        "examples": examples,
        "heads": heads,
        "tree": _tree(mask, operands, (heads, query_length, key_length), arrays),
        "data": [packed(x) for x in arrays],
        "blocks": blocks_of(plan),
        "numbers": _numbers(mask, query_length, key_length, plan),
    }


def content_of_plan(plan: Plan) -> dict[str, Any]:
    """All that a page needs to draw the blocks of a plan, as JSON.

    Raises:
        ValueError: if the plan is traced.
    """
    if not plan.is_static:
        raise ValueError("thing: expected a plan of known arrays, got a traced one")
    blocks = blocks_of(plan)
    examples, heads = blocks["shape"][:2]
    return {
        "text": "Plan",
        "queries": plan.query_length,
        "keys": plan.key_length,
        "examples": examples,
        "heads": heads,
        "blocks": blocks,
        "numbers": [[*row] for row in _block_numbers(plan)],
    }


def blocks_of(plan: Plan) -> dict[str, Any]:
    """The live blocks of a plan, as runs of each row of blocks.

    ``runs`` holds, row by row, pairs of numbers: twice the distance to the end of the
    run before, plus 1 if the blocks are full; and the number of blocks. ``counts``
    holds the number of runs of each row of blocks; rows of example 0 and head 0 come
    first, then those of head 1, and so on.
    """
    full, partial = plan.rows
    examples, heads, rows = _shape(plan)
    counts, runs = [], []
    parts = [(full, 1), (partial, 0)]
    for index in np.ndindex(examples, heads, rows):
        found = []
        for intervals, kind in parts:
            lo, hi = (
                np.broadcast_to(x, (examples, heads, *x.shape[2:]))[index]
                for x in intervals
            )
            found += [(a, b, kind) for a, b in zip(lo, hi, strict=True) if a < b]
        end = 0
        for lo, hi, kind in sorted(found):
            runs += [2 * (int(lo) - end) + kind, int(hi - lo)]
            end = int(hi)
        counts.append(len(found))
    return {
        "size": [plan.block_q, plan.block_k],
        "shape": [examples, heads, rows, -(-plan.key_length // plan.block_k)],
        "counts": packed(np.array(counts, np.int32)),
        "runs": packed(np.array(runs, np.int32)),
    }


def _numbers(mask: Mask, t: int, s: int, plan: Plan) -> list[list[str]]:
    """Names and values of a table."""
    examples, heads, rows = shape = _shape(plan)
    pairs = t * s * examples * heads
    queries = np.minimum(plan.block_q, t - plan.block_q * np.arange(rows))
    full, partial = (
        int((np.broadcast_to(x.per_row(), shape) * queries).sum(dtype=np.int64))
        * plan.block_k
        for x in plan.rows
    )
    if partial <= _MOST_COUNTED:
        density = float(mask.density(t, s))
        counted = f"{round(density * pairs):,}", f"{density:.4%}"
    else:
        most = min(full + partial, pairs)
        counted = (
            f"between {full:,} and {most:,}",
            f"between {full / pairs:.4%} and {most / pairs:.4%}",
        )
    rows = [*zip(("visible pairs", "density"), counted, strict=True)]
    if t == s and t > 1:
        layers, exact = layers_at_least(mask, t)
        bound = "" if exact else "at least "
        rows.append(("layers until all that can be is connected", f"{bound}{layers:,}"))
    return [[*row] for row in (*rows, *_block_numbers(plan))]


def _shape(plan: Plan) -> tuple[int, ...]:
    """Examples, heads and rows of blocks of a plan."""
    full, partial = plan.rows
    return np.broadcast_shapes(full.lo.shape[:3], partial.lo.shape[:3])


def _block_numbers(plan: Plan) -> list[tuple[str, str]]:
    examples, heads, rows = shape = _shape(plan)
    full, partial = (
        int(np.broadcast_to(np.asarray(x.per_row(), np.int64), shape).sum())
        for x in plan.rows
    )
    total = examples * heads * rows * -(-plan.key_length // plan.block_k)
    live = full + partial
    work = live * plan.block_q * plan.block_k / (examples * heads) * 64 / 1e9
    moved = live * plan.block_k / (examples * heads) * 2 * 64 * 4
    return [
        ("a block", f"{plan.block_q:,} queries x {plan.block_k:,} keys"),
        ("live blocks", f"{live:,} of {total:,} ({live / max(total, 1):.2%})"),
        ("full blocks", f"{full:,}"),
        ("partial blocks", f"{partial:,}"),
        # Two products of queries and keys forward, five backward.
        ("forward, a head of size 64", f"{4 * work:,.3f} GFLOP executed"),
        ("backward, a head of size 64", f"{10 * work:,.3f} GFLOP executed"),
        # A live block reads its keys and values once.
        ("keys and values read, forward", f"{moved / 1e6:,.1f} MB (float32)"),
    ]


def _tree(
    mask: Mask, operands: PyTree, sizes: tuple[int, ...], arrays: list[np.ndarray]
) -> dict[str, Any]:
    """The expression: ``op`` and ``parts``, or ``text`` and ``body`` of a function.

    Sizes are the heads of the page, T and S.
    """
    if type(mask) is Not:
        return {"op": "not", "parts": [_tree(mask.part, operands, sizes, arrays)]}
    if (op := _OPS.get(type(mask))) is not None:
        combined: Any = mask
        each = zip(combined.parts, operands, strict=True)
        node = {"op": op, "parts": [_tree(m, o, sizes, arrays) for m, o in each]}
        return node | ({"order": [*combined.order]} if op == "head" else {})
    leaf: dict[str, Any] = {"text": repr(mask)}
    try:
        found = function_of(mask, operands)
    except NotTranslated as error:
        leaf["why"] = str(error)
        heads, t, s = sizes
        leaves = jax.tree.leaves(operands)
        own = heads if reads_head(mask, operands) else 1
        count = max((x.shape[0] * max(x.shape[1], own) for x in leaves), default=own)
        if count * t * s > _MOST_PAIRS:
            return leaf
        queries = jnp.broadcast_to(slot_operand(t, 2), (1, own, t, 1))
        return leaf | _stored(
            dense_visible(mask, operands, queries, slot_operand(s, 3)), arrays
        )
    first = len(arrays)
    arrays.extend(found.arrays)
    return leaf | {"body": found.body, "data": [*range(first, len(arrays))]}


def _stored(pairs: Array, arrays: list[np.ndarray]) -> dict[str, Any]:
    """A function that reads the pairs of a mask from an array."""
    b, n, t, s = pairs.shape
    arrays.append(np.asarray(pairs, np.uint8))
    example = f"example * {n * t * s} + " if b > 1 else ""
    head = f"head * {t * s} + " if n > 1 else ""
    body = f"return data[0][{example}{head}t * {s} + s] === 1;"
    return {"body": body, "data": [len(arrays) - 1]}


def packed(array: np.ndarray) -> dict[str, str]:
    """An array as text: its type, and its bytes, compressed, in base 64."""
    array = np.asarray(array)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    kind = array.dtype.newbyteorder("<")
    packed = zlib.compress(np.ascontiguousarray(array, kind).tobytes(), 9)
    return {"type": array.dtype.name, "bytes": base64.b64encode(packed).decode()}


def as_json(content: Any) -> str:
    """JSON that may stand in a ``script`` element: no ``<`` that would end it."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c")
