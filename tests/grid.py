"""The grid of the conformance tests: what is listed here is tested in combination.

A builder takes a ``Setting`` (sizes and a NumPy generator) and returns a score, mask or
modifier with float32 arrays; tests cast them to the dtype of the cell.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import Modifier, Score, masks, modifiers, scores
from attnlab._src.implementations.native import load
from attnlab._src.types import Operand, pytree

#: A parameter for tests over implementations; skipped if the library is missing.
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(load.why_not() is not None, reason="not built")
)


class Setting(NamedTuple):
    """Axis sizes by letter (``Q``: head size of the query), and a generator."""

    B: int
    T: int
    S: int
    N: int
    K: int
    Q: int
    H: int
    D: int
    rng: np.random.Generator

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    @property
    def key(self) -> jax.Array:
        return jax.random.key(int(self.rng.integers(2**31)))


@pytree
class Distance(Score):
    """A user's own score: ``-weight[head] |q - k|``, Laplacian attention."""

    weight: Any

    def pair_params(self):
        return self.weight

    def compare(self, params, query, key):
        query, key = query.astype(params.dtype), key.astype(params.dtype)
        difference = query[:, None, :] - key[None, :, :]
        return -params * jnp.sqrt(difference * difference + 0.5).sum(-1)


@pytree
class RowScale(Modifier):
    """A user's own modifier: ``logits * (1 + scale[t])``."""

    scale: Any

    def operands(self):
        return (Operand(self.scale),)

    def apply(self, logits, tile, *operands):
        return logits * (1 + operands[0].astype(logits.dtype))


def closer_than(t, s, reach):
    """A user's own mask rule, with an operand that runs along the queries."""
    return abs(t - s) < reach


def odd_sum(t, s):
    return (t + s) % 2 == 1


def _bilinear(s: Setting) -> Score:
    return scores.bilinear.init(s.key, s.Q, s.H, num_heads=s.N)


def _additive(s: Setting) -> Score:
    made = scores.additive.init(
        s.key, s.Q, s.H, hidden_size=11, num_heads=s.N, num_key_heads=s.K
    )
    return type(made)(
        made.query_weight, made.key_weight, s.normal(s.N, 11), made.weight
    )


def _mlp(s: Setting) -> Score:
    return scores.mlp.init(
        s.key,
        s.Q,
        s.H,
        hidden_sizes=(11, 3),
        num_heads=s.N,
        num_key_heads=s.K,
        activation=jnp.tanh,
    )


#: Scores whose query and key sizes differ in the tests.
PROJECTING = frozenset({"bilinear", "additive", "mlp"})

SCORES: dict[str, Callable[[Setting], Score]] = {
    "scaled_dot": lambda s: scores.scaled_dot(),
    "dot": lambda s: scores.dot(),
    "scale_per_head": lambda s: scores.scaled_dot(0.3 + 0.1 * s.normal(s.N)),
    "bilinear": _bilinear,
    "cosine": lambda s: scores.cosine(3 + s.normal(s.N)),
    "additive": _additive,
    "concat": lambda s: scores.concat.init(s.key, s.H, hidden_size=11),
    "mlp": _mlp,
    "own": lambda s: Distance(1 + 0.1 * s.normal(s.N)),
}

MODIFIERS: dict[str, Callable[[Setting], tuple[Modifier, ...]]] = {
    "none": lambda s: (),
    "soft_cap": lambda s: (modifiers.soft_cap(1 + s.rng.random((s.N, 1, 1), "f")),),
    "alibi": lambda s: (modifiers.alibi(0.2 * s.rng.random(s.N, "f")),),
    "t5": lambda s: (modifiers.relative_bias(s.normal(s.N, 8), max_distance=13),),
    "t5_causal": lambda s: (
        modifiers.relative_bias(s.normal(1, 6), bidirectional=False, max_distance=11),
    ),
    "clipped": lambda s: (
        modifiers.clipped_relative(s.normal(s.N, 6), left=3, right=2),
    ),
    "bias": lambda s: (modifiers.bias(s.normal(s.B, s.N, s.T, s.S)),),
    "bias_keys": lambda s: (modifiers.bias(s.normal(s.B, 1, 1, s.S)),),
    "stacked": lambda s: (
        RowScale(0.2 * s.normal(s.N, s.T, 1)),
        modifiers.bias(s.normal(s.T, s.S)),
        modifiers.soft_cap(4.0),
    ),
}


def _ids(s: Setting, length: int) -> np.ndarray:
    return np.sort(s.rng.integers(-1, 3, (s.B, length)))


def _per_head(s: Setting) -> masks.Mask:
    kinds = (
        masks.causal(),
        masks.sliding_window(3, 4) | masks.anchor(2),
        masks.full(),
        ~masks.prefix(3),
    )
    return masks.per_head([kinds[n % len(kinds)] for n in range(s.N)])


MASKS: dict[str, Callable[[Setting], Any]] = {
    "none": lambda s: None,
    "causal": lambda s: masks.causal(),
    "window": lambda s: masks.sliding_window(3, 4),
    "dilated": lambda s: masks.dilated_window(6, 4, 2),
    "longformer": lambda s: masks.longformer(window=2, anchors=[1, 7, 8]),
    "anchor_data": lambda s: masks.anchor(s.rng.integers(-1, s.T, (s.B, 3))),
    "big_bird": lambda s: masks.big_bird(
        window=1,
        anchors=2,
        random_blocks=2,
        rng=jax.random.key(3),
        block_size=3,
        num_blocks=max(16, -(-max(s.T, s.S) // 3)),
    ),
    "blocks": lambda s: (
        masks.blocks(
            s.rng.integers(-1, -(-s.S // 3), (s.K, max(6, -(-s.T // 5)), 2)),
            query_block=5,
            key_block=3,
        )
        | masks.selected(s.rng.integers(-1, s.S, (s.B, s.K, s.T, 3)))
    ),
    "prefix": lambda s: masks.causal() | masks.prefix(5),
    "chunked": lambda s: masks.chunked(5) & ~masks.prefix(1),
    "streaming": lambda s: masks.streaming(anchors=2, window=3),
    "documents": lambda s: masks.causal() & masks.documents(_ids(s, s.T), _ids(s, s.S)),
    "lengths": lambda s: masks.lengths(
        query=s.rng.integers(0, s.T + 1, s.B), key=s.rng.integers(0, s.S + 1, s.B)
    ),
    "dense": lambda s: s.rng.random((s.B, 1, s.T, s.S)) < 0.2,
    "predicate": lambda s: (
        masks.sliding_window(7, 7)
        & masks.predicate(closer_than, s.rng.integers(0, 7, (s.N, s.T, 1), np.int32))
    ),
    "per_head": _per_head,
    "not": lambda s: (
        ~(masks.sliding_window(1, 2) | masks.dense(s.rng.random((s.T, s.S)) < 0.1))
    ),
}


class Heads(NamedTuple):
    N: int
    K: int
    H: int
    D: int


HEADS = {
    "grouped": Heads(6, 3, 7, 5),
    "grouped_square": Heads(4, 2, 5, 5),
    "each": Heads(3, 3, 7, 7),
    "one_key_head": Heads(5, 1, 3, 7),
}

LENGTHS = {"wide": (13, 19), "tall": (19, 13), "square": (17, 17)}

DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": np.float64,
}


def _explicit(s: Setting) -> dict[str, Any]:
    query = np.arange(s.T, dtype=np.int32) + 2
    key = s.rng.permuted(np.tile(np.arange(s.S, dtype=np.int32), (s.B, 1)), axis=1)
    query[s.T // 2] = -1
    key[:, 1] = -1
    return dict(query_positions=query, key_positions=key)


POSITIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "index": lambda s: {},
    "offset": lambda s: dict(query_offset=np.int32(3)),
    "offset_batch": lambda s: dict(query_offset=s.rng.integers(0, 5, s.B, np.int32)),
    "explicit": _explicit,
}

#: Options of the softmax: (sinks, dropout rate).
SOFTMAX = {"plain": (False, 0.0), "sinks": (True, 0.0), "dropout": (False, 0.3)}

#: Sizes for the fixture ``tile``: queries, keys, keys in a chunk.
TILES = {"chunks": (8, 4, 8), "blocks": (8, 4, None), "whole": (64, 64, None)}

FACTORS: dict[str, tuple[str, ...]] = {
    name: tuple(levels)
    for name, levels in dict(
        score=SCORES,
        mask=MASKS,
        modifier=MODIFIERS,
        heads=HEADS,
        dtype=DTYPES,
        positions=POSITIONS,
        softmax=SOFTMAX,
        lengths=LENGTHS,
        tiles=TILES,
    ).items()
}


class Cell(NamedTuple):
    """One level of each factor."""

    score: str
    mask: str
    modifier: str
    heads: str
    dtype: str
    positions: str
    softmax: str
    lengths: str
    tiles: str

    def __str__(self) -> str:
        return "-".join(self)


def pairs_of(cell: tuple[str | None, ...]) -> Iterator[tuple]:
    """The pairs of (factor, level) that a (partly filled) cell covers."""
    named = [(i, level) for i, level in enumerate(cell) if level is not None]
    yield from itertools.combinations(named, 2)


def covering() -> list[Cell]:
    """A pairwise covering array: every two levels of two factors occur in some cell.

    Built greedily and deterministically: each cell starts with a pair that does not
    occur yet; each further factor gets the level that adds most new pairs, and of equal
    ones the least used.
    """
    levels = list(FACTORS.values())
    open_pairs = {
        pair: None
        for i, j in itertools.combinations(range(len(levels)), 2)
        for pair in itertools.product(
            ((i, x) for x in levels[i]), ((j, x) for x in levels[j])
        )
    }
    used = {(i, x): 0 for i, each in enumerate(levels) for x in each}
    cells = []
    while open_pairs:
        chosen: list[str | None] = [None] * len(levels)
        for i, level in next(iter(open_pairs)):
            chosen[i] = level
        for i in range(len(levels)):
            if chosen[i] is not None:
                continue

            taken = [(j, x) for j, x in enumerate(chosen) if x is not None]

            def gain(level: str, i: int = i, taken: list = taken) -> tuple[int, int]:
                closed = sum(
                    tuple(sorted([(i, level), other])) in open_pairs for other in taken
                )
                return closed, -used[i, level]

            chosen[i] = max(levels[i], key=gain)
        for pair in pairs_of(tuple(chosen)):
            open_pairs.pop(pair, None)
        found = [x for x in chosen if x is not None]
        for i, level in enumerate(found):
            used[i, level] += 1
        cells.append(Cell(*found))
    return cells


def quick(cells: list[Cell], also: tuple[str, ...] = ()) -> list[Any]:
    """The cells as parameters, marked slow except for a few that have every level.

    Args:
        cells: cells of the grid.
        also: names of further cells that are not slow.
    """
    chosen = [cell for cell in cells if str(cell) in also]
    assert len(chosen) == len(also)

    def levels(cells: list[Cell]) -> set[tuple[str, str]]:
        return {level for cell in cells for level in cell._asdict().items()}

    while missing := levels(cells) - levels(chosen):
        chosen.append(max(cells, key=lambda cell: len(missing & levels([cell]))))
    return [
        pytest.param(cell, marks=() if cell in chosen else pytest.mark.slow)
        for cell in cells
    ]


def _parameter(values: Iterable[Any], slow: bool) -> Any:
    """Joins values, which may be ``pytest.param``, into one ``pytest.param``."""
    marks, plain = [pytest.mark.slow] * slow, []
    for value in values:
        of_pytest = hasattr(value, "marks")
        marks += value.marks if of_pytest else ()
        plain += value.values if of_pytest else (value,)
    return pytest.param(*plain, marks=marks)


def few(choices: Iterable[Any], *kept: Any) -> list[Any]:
    """Choices as parameters; all except ``kept`` are marked slow.

    A plain tuple is a choice for several parameters, ``pytest.param`` a single choice.
    """
    choices = [*choices]
    assert all(choice in choices for choice in kept), kept
    return [
        _parameter(
            choice if type(choice) is tuple else (choice,), slow=choice not in kept
        )
        for choice in choices
    ]


def in_turn(*axes: Iterable[Any]) -> list[Any]:
    """The product of axes as parameters; only some combinations are not marked slow.

    These are a ``zip`` of the axes, with the shorter ones repeated, so that each choice
    of each axis occurs.
    """
    lists = [[*axis] for axis in axes]
    most = max(map(len, lists))
    kept = {tuple(i % len(axis) for axis in lists) for i in range(most)}
    found = []
    for places in itertools.product(*(range(len(axis)) for axis in lists)):
        values = [axis[place] for axis, place in zip(lists, places, strict=True)]
        found.append(_parameter(values, slow=places not in kept))
    return found


def sampled(count: int, seed: int = 0) -> list[Cell]:
    """Cells drawn at random from the whole grid."""
    rng = random.Random(seed)
    return [
        Cell(*(rng.choice(levels) for levels in FACTORS.values())) for _ in range(count)
    ]


class Problem(NamedTuple):
    """The inputs of a cell: ``data`` is differentiated, ``fixed`` is not."""

    data: dict[str, Any]
    fixed: dict[str, Any]
    cotangents: tuple[np.ndarray, np.ndarray]
    dropout_rate: float


def cast(tree: Any, dtype: Any) -> Any:
    """Casts floating leaves to ``dtype``; other leaves are unchanged."""

    def one(x: Any) -> Any:
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating):
            return np.asarray(x).astype(dtype)
        return np.asarray(x, dtype) if isinstance(x, float) else x

    return jax.tree.map(one, tree)


def build(cell: Cell, seed: int = 0) -> Problem:
    """Inputs in the dtype of the cell; parameters in float32 (float64 for float64)."""
    heads, (t, s) = HEADS[cell.heads], LENGTHS[cell.lengths]
    n, k, h, d = heads
    q = h + 4 if cell.score in PROJECTING else h
    rng = np.random.default_rng(seed)
    setting = Setting(2, t, s, n, k, q, h, d, rng)
    sinks, rate = SOFTMAX[cell.softmax]
    dtype = DTYPES[cell.dtype]
    wide = np.float64 if cell.dtype == "float64" else np.float32
    arrays = cast(
        dict(
            query=setting.normal(2, t, n, q),
            key=setting.normal(2, s, k, h),
            value=setting.normal(2, s, k, d),
        ),
        dtype,
    )
    owned = dict(
        score=SCORES[cell.score](setting),
        modifiers=MODIFIERS[cell.modifier](setting),
        sinks=setting.normal(n) if sinks else None,
    )
    fixed = dict(mask=MASKS[cell.mask](setting), **POSITIONS[cell.positions](setting))
    if rate:
        fixed["dropout_rng"] = jax.random.key(5)
    cotangents = cast((setting.normal(2, t, n, d),), dtype)
    cotangents += cast((setting.normal(2, t, n),), wide)
    return Problem({**arrays, **cast(owned, wide)}, fixed, cotangents, rate)
