"""Checks of what the user gave: each failure names the argument, and what would do."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.masks.base import Mask, as_mask
from attnlab.scores.inner import ScaledDot
from attnlab.scores.projected import ProjectedKeys
from attnlab.types import Array, ArrayLike, Modifier, Score, accumulation_dtype


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`attnlab.attention`, described there."""

    score: Score | None
    mask: Any
    modifiers: Sequence[Modifier]
    sinks: ArrayLike | None
    dropout_rate: float
    dropout_rng: Array | None
    query_offset: int | ArrayLike
    query_positions: ArrayLike | None
    key_positions: ArrayLike | None
    precision: Any
    implementation: str | None


class Arguments(NamedTuple):
    """The arguments of one call: a pytree whose leaves are arrays (or their shapes).

    Attributes mirror the arguments of :func:`attnlab.attention`; ``query_offset`` is
    None where it is 0.
    """

    query: Any
    key: Any
    value: Any
    score: Score
    mask: Mask
    modifiers: tuple[Modifier, ...]
    sinks: Any
    dropout_rng: Any
    query_offset: Any
    query_positions: Any
    key_positions: Any


def _check_arrays(query: Any, key: Any, value: Any, projected: bool) -> None:
    """``projected``: the score made the key, and may have made it wider."""
    for name, x, letters in (
        ("query", query, "[..., T, N, H]"),
        ("key", key, "[..., S, K, H]"),
        ("value", value, "[..., S, K, D]"),
    ):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
        if len(x.shape) < 3:
            raise ValueError(
                f"{name}: expected at least three axes, {letters}, got shape {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
            raise TypeError(
                f"{name}: expected a floating dtype of at least 16 bits, got {x.dtype}"
            )
    for name, x in (("key", key), ("value", value)):
        may_be_wide = projected and name == "key"
        wide = accumulation_dtype(query.dtype) if may_be_wide else query.dtype
        if x.dtype not in (query.dtype, wide):
            raise TypeError(
                f"{name}: dtype {x.dtype} differs from the query's {query.dtype}; "
                f"cast one with .astype"
            )
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: batch axes {x.shape[:-3]} differ from the query's "
                f"{query.shape[:-3]}"
            )
    for what, axis in (("length S", -3), ("heads K", -2)):
        if key.shape[axis] != value.shape[axis]:
            raise ValueError(
                f"value: {what} is {value.shape[axis]}, but the key's is "
                f"{key.shape[axis]}; they must agree"
            )
    heads, key_heads = query.shape[-2], key.shape[-2]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"query: {heads} heads are not a multiple of the {key_heads} key/value "
            "heads; grouped heads need N % K == 0"
        )


def _check_positions(args: Arguments) -> None:
    query, key = args.query, args.key
    batch = query.shape[:-3]
    for name, x, length in (
        ("query_positions", args.query_positions, query.shape[-3]),
        ("key_positions", args.key_positions, key.shape[-3]),
    ):
        if x is None:
            continue
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integers, got {x.dtype}")
        if x.shape not in ((length,), (*batch, length)):
            raise ValueError(
                f"{name}: expected shape {(length,)} or {(*batch, length)}, "
                f"got {x.shape}"
            )
    offset = args.query_offset
    if offset is not None:
        if not jnp.issubdtype(offset.dtype, jnp.integer):
            raise TypeError(f"query_offset: expected integers, got {offset.dtype}")
        if offset.shape not in ((), batch):
            raise ValueError(
                f"query_offset: expected a scalar or shape {batch}, got {offset.shape}"
            )
    if args.query_positions is not None and offset is not None:
        raise ValueError(
            "query_offset, query_positions: give one of the two, got both; positions "
            "already say where each query stands"
        )


def _check_key(rng: Any) -> None:
    """One PRNG key, typed or not."""
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise TypeError(
            f"dropout_rng: expected a PRNG key, got {type(rng).__name__}; of Flax's "
            "nnx.Rngs call a stream: rngs.dropout()"
        )
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if rng.ndim != (0 if typed else 1):
        raise ValueError(
            f"dropout_rng: expected one PRNG key, got an array of shape {rng.shape}"
        )


def _as_offset(offset: Any) -> Any:
    """None for 0, which is structure; else data: a new one does not recompile."""
    if isinstance(offset, bool):
        raise TypeError("query_offset: expected an integer, got bool")
    if isinstance(offset, (int, np.integer)):
        return None if offset == 0 else jnp.int32(offset)
    if not hasattr(offset, "dtype"):
        raise TypeError(
            f"query_offset: expected an int or an integer array, "
            f"got {type(offset).__name__}"
        )
    return offset


def check(
    query: Any,
    key: Any,
    value: Any,
    *,
    score: Score | None = None,
    mask: Any = None,
    modifiers: Sequence[Modifier] = (),
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
    query_offset: Any = 0,
    query_positions: Any = None,
    key_positions: Any = None,
) -> Arguments:
    """Validates everything that shapes tell.

    Raises:
        TypeError, ValueError: naming the argument, what it got, and what would do.
    """
    _check_arrays(query, key, value, isinstance(score, ProjectedKeys))
    score = ScaledDot() if score is None else score
    if not isinstance(score, Score):
        hint = ""
        if isinstance(score, type):
            hint = "; that is a class: call it, or its init"
        raise TypeError(f"score: expected an attnlab score, got {score!r}{hint}")
    if any(leaf is score for leaf in jax.tree.leaves(score)):
        raise TypeError(
            f"score: {type(score).__name__} is no pytree; decorate it with "
            "attnlab.types.pytree"
        )
    if modifiers is None or isinstance(modifiers, Modifier):
        raise TypeError(
            f"modifiers: expected a sequence, got {modifiers!r}; write modifiers=[...]"
        )
    modifiers = tuple(modifiers)
    for modifier in modifiers:
        if not isinstance(modifier, Modifier):
            raise TypeError(
                f"modifiers: expected attnlab modifiers, got {type(modifier).__name__}"
                "; an array goes in as modifiers=[modifiers.bias(array)]"
            )
    traced = isinstance(dropout_rate, jax.core.Tracer)
    number = isinstance(dropout_rate, (int, float, np.number, np.ndarray, jax.Array))
    if traced or not number or not 0 <= dropout_rate < 1:
        raise ValueError(
            f"dropout_rate: expected a number in [0, 1), got {dropout_rate!r}"
        )
    if dropout_rate > 0 and dropout_rng is None:
        raise ValueError(
            f"dropout_rng: dropout_rate={dropout_rate} needs a PRNG key, got None"
        )
    heads = query.shape[-2]
    for name, x in (
        ("sinks", sinks),
        ("query_positions", query_positions),
        ("key_positions", key_positions),
    ):
        if x is not None and not hasattr(x, "dtype"):
            raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
    if dropout_rng is not None:
        _check_key(dropout_rng)
    if sinks is not None and tuple(sinks.shape) not in ((heads,), (1,)):
        raise ValueError(f"sinks: expected shape ({heads},), got {tuple(sinks.shape)}")
    args = Arguments(
        query,
        key,
        value,
        score,
        as_mask(mask),
        modifiers,
        sinks,
        dropout_rng if dropout_rate > 0 else None,
        _as_offset(query_offset),
        query_positions,
        key_positions,
    )
    _check_positions(args)
    return args


def check_fits(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    """Checks that an array broadcasts to ``[*batch, N, T, S]``.

    Args:
        name: of the argument.
        shape: of the array.
        full: the sizes of ``[*batch, N, T, S]``.

    Raises:
        ValueError: naming the argument and both shapes.
    """
    lead = full[len(full) - len(shape) :]
    if len(shape) > len(full) or any(
        have not in (1, want) for have, want in zip(shape, lead, strict=True)
    ):
        raise ValueError(
            f"{name}: shape {shape} does not broadcast to {full}, [*batch, N, T, S]; "
            "each axis must be full or 1"
        )


def check_operand_shapes(
    operands: Any, shape: tuple[int, int, int], owner: str
) -> None:
    """Each axis of a normalised operand must be full or 1.

    Args:
        operands: pytree of arrays ``[B, N, T, S, *payload]``.
        shape: (N, T, S).
        owner: whose operands they are, for the error.

    Raises:
        ValueError: naming the axis that does not fit.
    """
    for array in jax.tree.leaves(operands):
        for letter, have, want in zip("NTS", array.shape[1:4], shape, strict=True):
            if have not in (1, want):
                raise ValueError(
                    f"{owner}: an array of shape {tuple(array.shape)} ([B, N, T, S]) "
                    f"does not fit {letter}={want}"
                )
