"""Checks of the user's arguments: an error names the argument and what is expected."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding

from attnlab._src import arguments, placement
from attnlab._src.implementations.tile import precision_name
from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.intervals import FAR
from attnlab._src.masks.per_head import of_own_heads
from attnlab._src.masks.selected import fitted
from attnlab._src.ops.choice import named
from attnlab._src.scores.inner import ScaledDot
from attnlab._src.scores.projected import ProjectedKeys, check_score
from attnlab._src.types import (
    Array,
    ArrayLike,
    Modifier,
    PyTree,
    Score,
    accumulation_dtype,
)


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`attnlab.attention`, described there."""

    score: Score | None
    mask: Mask | ArrayLike | None
    modifiers: Sequence[Modifier]
    sinks: ArrayLike | None
    dropout_rate: float
    dropout_rng: Array | None
    query_offset: int | ArrayLike
    query_positions: ArrayLike | None
    key_positions: ArrayLike | None
    precision: PrecisionLike
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a call beside its arrays: structure, one static argument.

    Attributes:
        dropout_rate: in [0, 1).
        precision: of matrix products; None: ``jax.default_matmul_precision``.
        implementation: a name; None: the automatic choice.
        stats: whether the caller reads log-sum-exp.
        top_k: None: no weights; "all": all weights; or the number of greatest weights
            for each query.
        shared_dropout: whether all examples and heads have one dropout pattern, as with
            Flax's ``broadcast_dropout``.
        place: sharding of the query, ``[B, T, N]``, from explicit axes of its type or
            from ``sharding.use``; None where it is not known while tracing.
        strategy: how keys reach queries whose sequence is sharded; None: XLA gathers
            them.
        bound: what is known of the mask before the program runs, if there is a
            strategy; None: nothing.
    """

    dropout_rate: float = 0.0
    precision: PrecisionLike = None
    implementation: str | None = None
    stats: bool = False
    top_k: int | str | None = None
    shared_dropout: bool = False
    place: NamedSharding | None = None
    strategy: str | None = None
    bound: Mask | None = None

    def but(self, **changes: Any) -> "Settings":
        """A copy with some of them changed."""
        return dataclasses.replace(self, **changes)


def is_wide_float(dtype: np.dtype) -> bool:
    """Whether it is a floating type of at least 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 2


def _check_arrays(query: Any, key: Any, value: Any, projected: bool) -> None:
    """``projected``: the key is a projection, whose type may be a wider one."""
    for name, x, letters in (
        ("query", query, "[..., T, N, H]"),
        ("key", key, "[..., S, K, H]"),
        ("value", value, "[..., S, K, D]"),
    ):
        dtype = arguments.dtype_of(name, x)
        if len(x.shape) < 3:
            raise ValueError(
                f"{name}: expected at least three axes, {letters}, got shape {x.shape}"
            )
        if not is_wide_float(dtype):
            raise TypeError(
                f"{name}: expected a floating dtype of at least 16 bits, got {dtype}; "
                "cast it with .astype(jnp.bfloat16)"
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
        arguments.check_integers(name, x)
        if x.shape not in ((length,), (*batch, length)):
            raise ValueError(
                f"{name}: expected shape {(length,)} or {(*batch, length)}, "
                f"got {x.shape}"
            )
    offset = args.query_offset
    if offset is not None and offset.shape not in ((), batch):
        raise ValueError(
            f"query_offset: expected a scalar or shape {batch}, got {offset.shape}"
        )
    if args.query_positions is not None and offset is not None:
        raise ValueError(
            "query_offset, query_positions: give one of the two, got both; "
            "query_positions already has the position of each query"
        )


def _as_offset(offset: Any, length: int) -> Any:
    """None for 0, which is structure; else an array: a new one does not recompile."""
    is_int = isinstance(offset, (int, np.integer)) and not isinstance(offset, bool)
    if not is_int and not hasattr(offset, "dtype"):
        raise TypeError(
            f"query_offset: expected an int or an integer array, "
            f"got {type(offset).__name__}"
        )
    if is_int and offset == 0:
        return None
    checked = np.asarray(offset) if is_int else offset
    arguments.check_integers("query_offset", checked)
    if isinstance(checked, np.ndarray) and checked.size:
        if checked.min() < 0:
            raise ValueError(
                f"query_offset: expected positions of at least 0, got {checked.min()}; "
                "for slots that hold no query, give query_positions of -1"
            )
        if isinstance(length, int) and int(checked.max()) + length - 1 > FAR:
            raise ValueError(
                f"query_offset: expected at most {FAR + 1 - length} for {length} "
                f"queries, got {checked.max()}; the greatest position is {FAR}"
            )
    return jnp.asarray(checked, jnp.int32) if is_int else offset


def _check_leaves(name: str, owner: PyTree) -> None:
    """Checks that ``owner`` is a pytree of arrays and numbers."""
    kind = type(owner).__name__
    for path, leaf in jax.tree.leaves_with_path(owner):
        if isinstance(leaf, (Mask, Modifier, Score)):
            raise TypeError(
                f"{name}: {type(leaf).__name__} is no pytree; decorate it with "
                "attnlab.extend.pytree"
            )
        if not isinstance(leaf, (bool, int, float, complex)):
            arguments.check_kept(f"{name}: {kind}{jax.tree_util.keystr(path)}", leaf)


def _as_modifiers(modifiers: object) -> tuple[Modifier, ...]:
    if isinstance(modifiers, Modifier) or not isinstance(modifiers, Iterable):
        raise TypeError(
            f"modifiers: expected a sequence, got {modifiers!r}; write modifiers=[...]"
        )
    modifiers = tuple(modifiers)
    for modifier in modifiers:
        if isinstance(modifier, type) and issubclass(modifier, Modifier):
            raise TypeError(f"modifiers: {modifier.__name__} is a class: call it")
        if not isinstance(modifier, Modifier):
            raise TypeError(
                f"modifiers: expected attnlab modifiers, got {type(modifier).__name__}"
                "; an array goes in as modifiers=[modifiers.bias(array)]"
            )
        _check_leaves("modifiers", modifier)
    return modifiers


def _as_rate(rate: Any) -> float:
    traced = isinstance(rate, jax.core.Tracer)
    number = isinstance(rate, (int, float, np.number, np.ndarray, jax.Array))
    number = number and not traced and np.ndim(rate) == 0
    if not number or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {rate!r}")
    return float(rate)


def as_top_k(top_k: Any, length: int) -> int | Literal["all"] | None:
    """None, "all", or an int from 1 to the number of keys."""
    if top_k is None or (isinstance(top_k, str) and top_k == "all"):
        return top_k
    is_int = isinstance(top_k, (int, np.integer)) and not isinstance(top_k, bool)
    if not is_int or top_k < 1:
        raise ValueError(
            f"top_k: expected None, 'all' or an int of at least 1, got {top_k!r}"
        )
    if not isinstance(length, int):
        raise NotImplementedError(
            f"top_k: the greatest weights need a plan, but S is symbolic ({length}); "
            "use top_k='all' with implementation='reference'"
        )
    if top_k > length:
        raise ValueError(f"top_k: expected at most S={length} (keys), got {top_k}")
    return int(top_k)


def check_names(caller: str, options: Mapping[str, object]) -> None:
    """Checks the names of keyword arguments that a function passes on.

    Raises:
        TypeError: naming the function, and what it takes.
    """
    unknown = options.keys() - Options.__annotations__
    if unknown:
        raise TypeError(
            f"{caller}() got an unexpected keyword argument {min(unknown)!r}; it takes "
            f"{', '.join(Options.__annotations__)}"
        )


def check(
    query: Any, key: Any, value: Any, **options: Unpack[Options]
) -> tuple[Arguments, Settings]:
    """Validates the arguments of a call: types, shapes, and values that are known.

    Returns:
        The arrays of the call, and its settings, in which ``stats`` and ``top_k`` are
        not set yet.

    Raises:
        TypeError, ValueError: naming the argument, what it got, and what is expected.
    """
    # Checked whatever implementation runs.
    precision = options.get("precision")
    precision_name(precision)
    implementation = options.get("implementation")
    if implementation is not None:
        named(implementation)
    score = options.get("score")
    _check_arrays(query, key, value, isinstance(score, ProjectedKeys))
    score = ScaledDot() if score is None else score
    check_score(score)
    _check_leaves("score", score)
    modifiers = _as_modifiers(options.get("modifiers", ()))
    dropout_rate = _as_rate(options.get("dropout_rate", 0.0))
    dropout_rng, sinks = options.get("dropout_rng"), options.get("sinks")
    if dropout_rate > 0 and dropout_rng is None:
        raise ValueError(
            f"dropout_rng: dropout_rate={dropout_rate} needs a PRNG key, got None"
        )
    query_positions = options.get("query_positions")
    key_positions = options.get("key_positions")
    heads = query.shape[-2]
    for name, x in (
        ("sinks", sinks),
        ("query_positions", query_positions),
        ("key_positions", key_positions),
    ):
        if x is not None:
            arguments.dtype_of(name, x)
    if dropout_rng is not None:
        hint = "; with Flax's nnx.Rngs, give rngs.dropout()"
        arguments.prng_key("dropout_rng", dropout_rng, hint)
    if sinks is not None:
        arguments.floating("sinks", sinks)
        sinks = placement.of_own_heads(sinks, heads, 0) if sinks.ndim else sinks
        if tuple(sinks.shape) not in ((heads,), (1,)):
            raise ValueError(
                f"sinks: expected shape ({heads},), got {tuple(sinks.shape)}"
            )
    mask = as_mask(options.get("mask"))
    _check_leaves("mask", mask)
    if (whole := placement.all_heads(heads)) != heads:
        first = placement.first_of_shard("heads", heads)
        mask = of_own_heads(mask, whole, first, heads)
    key_heads = key.shape[-2]
    all_key_heads = placement.all_heads(key_heads)
    offset = _as_offset(options.get("query_offset", 0), query.shape[-3])
    at_slots = offset is query_positions is key_positions is None
    lengths = (query.shape[-3], key.shape[-3]) if at_slots else None
    mask = fitted(mask, whole, (key_heads, all_key_heads), lengths)
    args = Arguments(
        query,
        key,
        value,
        score,
        mask,
        modifiers,
        sinks,
        dropout_rng if dropout_rate > 0 else None,
        offset,
        query_positions,
        key_positions,
    )
    _check_positions(args)
    return args, Settings(dropout_rate, precision, implementation)


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
    operands: PyTree, shape: tuple[int, int, int], owner: str
) -> None:
    """Checks that each axis of normalised operands is full or 1.

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
