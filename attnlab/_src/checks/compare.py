"""Compares evaluations: values and every gradient, by their rounding errors."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from attnlab._src.ops.attention import attention_with_stats
from attnlab._src.types import Array, PyTree


def named_leaves(tree: PyTree) -> Iterator[tuple[str, np.ndarray, np.dtype]]:
    """Path, float64 values and dtype of each leaf."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        yield name, np.asarray(x, np.float64), x.dtype


def compare(
    found: PyTree,
    reference: PyTree,
    exact: PyTree,
    coarse: DTypeLike,
    terms: int,
    pairs: int,
) -> None:
    """Error of ``found`` <= 2 x error of ``reference`` + rounding, array by array.

    Args:
        found: arrays of the implementation.
        reference: arrays of the reference in the same types.
        exact: arrays of the reference in float64.
        coarse: the type of query, key and value; parameters are used in it, so their
            gradients, too, are rounded to it.
        terms: how many terms a sum over an axis has; each adds a rounding error.
        pairs: how many query-key pairs add to a gradient that all of them share.

    Raises:
        AssertionError: naming the array, its error and what is allowed.
    """
    rows = [list(named_leaves(tree)) for tree in (found, reference, exact)]
    for other in rows[1:]:
        assert [name for name, *_ in rows[0]] == [name for name, *_ in other]
    for one, other, third in zip(*rows, strict=True):
        (name, x, dtype), low, truth = one, other[1], third[1]
        assert dtype == other[2], f"{name}: dtype {dtype}, expected {other[2]}"
        assert x.shape == truth.shape, f"{name}: shape {x.shape}, not {truth.shape}"
        shown = ~np.isneginf(truth)
        assert (np.isneginf(x) == ~shown).all(), (
            f"{name}: -inf is not where the reference has it"
        )
        assert np.isfinite(x[shown]).all(), f"{name}: not finite"

        def greatest(array: np.ndarray, shown: np.ndarray = shown) -> float:
            return np.abs(array[shown]).max(initial=0)

        accumulated = np.float64 if dtype == np.float64 else np.float32
        each = terms + pairs / max(x.size, 1)
        rounding = float(jnp.finfo(coarse).eps) + each * np.finfo(accumulated).eps
        with np.errstate(invalid="ignore"):
            allowed = 2 * greatest(low - truth) + rounding * greatest(truth)
            error = greatest(x - truth)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


class Problem(NamedTuple):
    """Attention to evaluate, as a function of its arrays.

    Attributes:
        data: arguments of ``attention`` that are differentiated: ``query``, ``key``,
            ``value``, and others with floating leaves.
        fixed: keyword arguments that are not differentiated.
        dropout_rate: in [0, 1).
    """

    data: dict[str, Any]
    fixed: dict[str, Any]
    dropout_rate: float = 0.0

    def cast(self, dtype: DTypeLike) -> "Problem":
        """With all floating data in another type."""
        return self._replace(data=cast(self.data, dtype))


def cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Every floating array in another type."""

    def one(x: object) -> object:
        is_array = isinstance(x, (np.ndarray, jax.Array))
        return (
            x.astype(dtype) if is_array and jnp.issubdtype(x.dtype, np.inexact) else x
        )

    return jax.tree.map(one, tree)


def like(x: Array, seed: int) -> np.ndarray:
    """Random numbers of that shape and dtype."""
    drawn = np.random.default_rng(seed).normal(size=x.shape)
    return np.asarray(drawn).astype(x.dtype)


def evaluate(problem: Problem, implementation: str | None) -> dict[str, PyTree]:
    """Output, log-sum-exp and the gradients of all floating data, compiled once."""

    def forward(moving: dict[str, Array]) -> tuple[Array, Array]:
        options = _merged(problem.data, moving) | problem.fixed
        rate = problem.dropout_rate
        found = attention_with_stats(
            **options, dropout_rate=rate, implementation=implementation
        )
        return found.output, found.lse

    @jax.jit
    def both(moving: dict[str, Array]) -> dict[str, PyTree]:
        (output, lse), pull = jax.vjp(forward, moving)
        above = jnp.asarray(like(output, 1)), jnp.asarray(like(lse, 2))
        # The log-sum-exp of a query that sees nothing gets no cotangent.
        above = above[0], jnp.where(jnp.isneginf(lse), 0, above[1])
        return {"output": output, "lse": lse, "gradient": pull(above)[0]}

    moving = _moving(problem.data)
    # Values of 16-bit types are rounded to 16 bits, in every implementation.
    compiled = both.lower(moving).compile({"xla_allow_excess_precision": False})
    return jax.block_until_ready(compiled(moving))


def _moving(data: dict[str, Any]) -> dict[str, Array]:
    """The floating leaves by their path: "query", "score.weight", ..."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    named = {_name(path): x for path, x in leaves}
    return {k: x for k, x in named.items() if jnp.issubdtype(x.dtype, np.floating)}


def _merged(data: dict[str, Any], moving: dict[str, Array]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: moving.get(_name(path), x), data
    )


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def agrees(problem: Problem, implementation: str, dtype: DTypeLike) -> None:
    """Compares an implementation with the reference in a type, as ``compare`` does.

    Raises:
        AssertionError: naming the array that differs.
        NotImplementedError: if the implementation does not take the problem.
    """
    problem = problem.cast(dtype)
    found = evaluate(problem, implementation)
    with jax.enable_x64(True):
        exact = evaluate(problem.cast(np.float64), "reference")
    wide = jnp.dtype(dtype) == np.float64
    reference = exact if wide else evaluate(problem, "reference")
    query, key = problem.data["query"], problem.data["key"]
    terms = query.shape[-3] + key.shape[-3] + query.shape[-2] + query.shape[-1]
    pairs = exact["lse"].size * key.shape[-3]
    compare(found, reference, exact, dtype, terms, pairs)
