"""Checks the laws of scores, modifiers and masks on one object."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.checks.compare import Problem, agrees, cast, evaluate, named_leaves
from attnlab._src.checks.report import Checker, Report
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.masks.base import Mask, full
from attnlab._src.masks.data import documents
from attnlab._src.masks.planning import alone, dense_mask, plan_mask
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.masks.structural import causal, sliding_window
from attnlab._src.operands import cut
from attnlab._src.ops.attention import attention
from attnlab._src.ops.choice import default_platform
from attnlab._src.types import Intervals, Live, Modifier, PyTree, Score, Tile


class Sizes(NamedTuple):
    """The sizes of the attention problem that is evaluated.

    Attributes:
        batch: B.
        query_length: T.
        key_length: S.
        num_heads: N.
        num_key_heads: K.
        head_size: H and D.
        query_size: H of the query, where the score takes two sizes.
    """

    batch: int
    query_length: int
    key_length: int
    num_heads: int
    num_key_heads: int
    head_size: int
    query_size: int

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """Query, key and value, random, float32."""
        b, t, s, n, k, h, q = self
        rng = np.random.default_rng(seed)
        shapes = {"query": (b, t, n, q), "key": (b, s, k, h), "value": (b, s, k, h)}
        return {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        }


def is_pytree(checker: Checker, x: PyTree) -> None:
    """Checks that arrays are leaves, and that the rest is hashable structure."""
    with checker.law("arrays are leaves, all else is hashable structure"):
        leaves, structure = jax.tree.flatten(x)
        kind = type(x).__name__
        assert not any(leaf is x for leaf in leaves), f"{kind} is no pytree: @pytree"
        hash(structure)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(x), f"flattening {kind} makes {type(again).__name__}"
        other = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 0, x)
        assert jax.tree.structure(other) == structure, (
            "new numbers change the structure: they would compile again"
        )


def _runs_here(name: str) -> bool:
    only = IMPLEMENTATIONS[name].platforms
    return only is None or default_platform() in only


def on_every_implementation(checker: Checker, what: str, problem: Problem) -> None:
    """Checks that each implementation that runs here agrees with the reference."""
    for name in IMPLEMENTATIONS:
        if name in ("reference", "jax_nn", "splash") or not _runs_here(name):
            continue
        law = f"{what}: {name} computes what the reference does"
        with checker.law(law, may_refuse=True):
            agrees(problem, name, np.float32)
    with checker.law(f"{what}: bfloat16"):
        agrees(problem, "tiled", jnp.bfloat16)


def _masks(sizes: Sizes) -> dict[str, Mask]:
    t, s = sizes.query_length, sizes.key_length
    return {
        "full": full(),
        "window": causal() & sliding_window(4, 0),
        "documents": documents(np.arange(t) // 5, np.arange(s) // 5),
    }


def check_score(score: Score, sizes: Sizes) -> Report:
    """Checks the laws of a score; see :func:`attnlab.extend.check`."""
    checker = Checker(f"score {type(score).__name__}")
    is_pytree(checker, score)
    data = sizes.arrays()
    query, key = jnp.asarray(data["query"]), jnp.asarray(data["key"])
    with checker.law("projections act on each token alone"):
        for name, x in (("project_query", query), ("project_key", key)):
            project = getattr(score, name)
            each = [project(x[:, i : i + 1]) for i in range(x.shape[1])]
            np.testing.assert_allclose(
                project(x), jnp.concatenate(each, 1), rtol=1e-5, atol=1e-5, err_msg=name
            )
    if not score.is_inner_product:
        with checker.law("compare looks at one pair at a time"):
            params = jax.tree.map(lambda x: jnp.asarray(x)[0], score.pair_params())
            without_arrays = jax.tree.map(lambda _: None, score)
            q, k = score.project_query(query)[0, :, 0], score.project_key(key)[0, :, 0]
            whole = without_arrays.compare(params, q, k)
            assert whole.shape == (len(q), len(k)), f"compare yields {whole.shape}"
            part = without_arrays.compare(params, q[1:3], k[2:7])
            np.testing.assert_allclose(whole[1:3, 2:7], part, rtol=1e-5, atol=1e-5)
    for name, mask in _masks(sizes).items():
        problem = Problem(data | {"score": _as_arrays(score)}, {"mask": mask})
        on_every_implementation(checker, f"mask {name}", problem)
    if sizes.query_size == sizes.head_size:
        with checker.law("gradients are finite where query and key are equal"):
            same = {**data, "query": _spread(data["key"], sizes)}
            problem = Problem({**same, "score": _as_arrays(score)}, {})
            for name, x, _ in named_leaves(evaluate(problem, "tiled")):
                assert np.isfinite(x).all(), f"{name}: not finite"
    _hidden_is_nothing(checker, data, {"score": score})
    vmap_is_a_loop(checker, sizes, {"score": score})
    return checker.report()


def check_modifier(modifier: Modifier, sizes: Sizes) -> Report:
    """Checks the laws of a modifier; see :func:`attnlab.extend.check`."""
    checker = Checker(f"modifier {type(modifier).__name__}")
    is_pytree(checker, modifier)
    data = sizes.arrays()
    for name, mask in _masks(sizes).items():
        changed = {"modifiers": (_as_arrays(modifier),)}
        problem = Problem(data | changed, {"mask": mask})
        on_every_implementation(checker, f"mask {name}", problem)
    _hidden_is_nothing(checker, data, {"modifiers": (modifier,)})
    vmap_is_a_loop(checker, sizes, {"modifiers": (modifier,)})
    return checker.report()


def check_mask(mask: Mask, sizes: Sizes) -> Report:
    """Checks the laws of a mask; see :func:`attnlab.extend.check`."""
    checker = Checker(f"mask {mask!r}")
    is_pytree(checker, mask)
    t, s = sizes.query_length, sizes.key_length
    dense = _seen(checker, mask, t, s)
    if dense is not None:
        _bounds_are_sound(checker, mask, dense)
        _larger(checker, mask)
        with checker.law("may_be_alive and sees_itself are right"):
            operands, _ = alone(mask, t, s)
            for side, axis in (("query", 3), ("key", 2)):
                may = mask.may_be_alive(side, operands)
                if may is not None:
                    seen = np.broadcast_to(dense.any(axis, keepdims=True), dense.shape)
                    may = np.broadcast_to(np.asarray(may), dense.shape)
                    assert not (seen & ~may).any(), (
                        f"may_be_alive is False for a {side} that is alive"
                    )
            if mask.sees_itself:
                least = min(t, s)
                every = dense[..., range(least), range(least)]
                assert every.all(), "sees_itself is True, but a position does not"
    problem = Problem(sizes.arrays(), {"mask": mask})
    on_every_implementation(checker, "attention", problem)
    _hidden_is_nothing(checker, sizes.arrays(), {"mask": mask})
    vmap_is_a_loop(checker, sizes, {"mask": mask})
    return checker.report()


def _seen(checker: Checker, mask: Mask, t: int, s: int) -> np.ndarray | None:
    """The whole mask, ``[B or 1, N or 1, T, S]``; None if ``visible`` fails."""
    dense = None
    law = f"visible of a tile agrees with all of {t} queries x {s} keys"
    with checker.law(law) as notes:
        dense = np.asarray(dense_mask(mask, t, s))
        dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
        notes.append(f"{dense.mean():.0%} of the pairs are visible")
        _parts_of_visible(mask, dense)
    return dense


def _larger(checker: Checker, mask: Mask) -> None:
    """Checks bounds on more blocks: small sizes miss faults."""
    t, s = 70, 67  # the last block is incomplete
    try:
        alone(mask, t, s)
    except ValueError as error:  # its arrays have other lengths
        checker.skip(f"bounds of {t} queries x {s} keys", str(error))
        return
    dense = _seen(checker, mask, t, s)
    if dense is not None:
        _bounds_are_sound(checker, mask, dense)


def _bounds_are_sound(checker: Checker, mask: Mask, dense: np.ndarray) -> None:
    t, s = dense.shape[2:]
    for block_q, block_k in ((1, 1), (4, 8), (8, 4), (16, 16)):
        law = (
            f"bounds are sound, {t} queries x {s} keys in blocks {block_q} x {block_k}"
        )
        with checker.law(law) as notes:
            plan = plan_mask(mask, t, s, (block_q, block_k))
            assert plan.cols is not None
            rows = _blocks_of(dense, block_q, block_k)
            notes.append(_sound("query", plan.rows, *rows))
            _sound("key", plan.cols, *(x.swapaxes(2, 3) for x in rows))


def _as_arrays(tree: PyTree) -> PyTree:
    return cast(jax.tree.map(np.asarray, tree), np.float32)


def _parts_of_visible(mask: Mask, dense: np.ndarray) -> None:
    t, s = dense.shape[2:]
    operands, _ = alone(mask, t, s)
    q, k = min(3, t), min(5, s)
    i, j = (t - q) // 2, (s - k) // 2
    for b, n in itertools.product(*map(range, dense.shape[:2])):
        own = jax.tree.map(lambda x, at=(b, n, i, j): cut(x, at, (q, k)), operands)
        queries = jnp.arange(i, i + q, dtype=jnp.int32)[:, None]
        keys = jnp.arange(j, j + k, dtype=jnp.int32)[None]
        part = visible_pairs(mask, Tile(queries, keys, jnp.int32(n)), own)
        whole = dense[b, n, i : i + q, j : j + k]
        np.testing.assert_array_equal(np.broadcast_to(part, whole.shape), whole)


def _blocks_of(dense: np.ndarray, size_q: int, size_k: int) -> list[np.ndarray]:
    """Which blocks hold a visible pair; which are complete and hold no hidden pair."""
    *lead, t, s = dense.shape
    q, k = -(-t // size_q), -(-s // size_k)
    found = []
    for fill, how in ((False, "any"), (True, "all")):
        padded = np.full((*lead, q * size_q, k * size_k), fill)
        padded[..., :t, :s] = dense
        cut = padded.reshape(*lead, q, size_q, k, size_k)
        found.append(getattr(cut, how)((-3, -1)))
    return found


def _sound(side: str, live: Live, some: np.ndarray, every: np.ndarray) -> str:
    """Checks that live blocks hold each visible pair, and full ones no hidden pair.

    ``side``: the side whose blocks are the rows.
    """
    other = "key" if side == "query" else "query"

    def first(where: np.ndarray) -> str:
        *_, row, column = np.argwhere(where)[0]
        return f"rows.side={side!r}: {side} block {row}, {other} block {column}"

    count = some.shape[3]
    full_blocks, partial = (_listed(x, count) for x in live)
    listed = full_blocks | partial
    if (missing := some & ~listed).any():
        raise AssertionError(
            f"{first(missing)} holds a visible pair and is not listed as possible"
        )
    if (wrong := full_blocks & ~every).any():
        raise AssertionError(f"{first(wrong)} is said to be full and hides a pair")
    return f"{listed.mean():.0%} of blocks live, {some.mean():.0%} necessary"


def _listed(intervals: Intervals, count: int) -> np.ndarray:
    lo, hi = (np.asarray(x)[..., None] for x in intervals)
    numbers = np.arange(count)
    return np.asarray(((numbers >= lo) & (numbers < hi)).any(-2))


def _hidden_is_nothing(
    checker: Checker, data: dict[str, Any], options: dict[str, Any]
) -> None:
    """Law 3, with padding that no query sees."""
    with checker.law("keys that no query sees affect nothing, even if they are NaN"):
        s = data["key"].shape[1]
        mask = options.get("mask", full()) & documents(
            np.zeros(data["query"].shape[1], int), np.where(np.arange(s) < s - 2, 0, -1)
        )
        poisoned = {name: x.copy() for name, x in data.items()}
        for name in ("key", "value"):
            poisoned[name][:, s - 2 :] = np.nan
        clean, other = (
            attention(**x, **options | {"mask": mask}) for x in (data, poisoned)
        )
        np.testing.assert_array_equal(clean, other)


def vmap_is_a_loop(checker: Checker, sizes: Sizes, options: dict[str, Any]) -> None:
    """Law 12, for one mapped axis over query, key and value."""
    with checker.law("jax.vmap equals a loop", may_refuse=True):
        both = [sizes.arrays(seed) for seed in (0, 1)]
        stacked = {name: np.stack([x[name] for x in both]) for name in both[0]}
        mapped = jax.vmap(lambda x: attention(**x, **options))(stacked)
        looped = [attention(**x, **options) for x in both]
        np.testing.assert_allclose(mapped, jnp.stack(looped), rtol=1e-4, atol=1e-5)


def _spread(key: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Keys ``[B, S, K, H]`` once for each query head that shares them."""
    return np.repeat(key, sizes.num_heads // sizes.num_key_heads, 2)
