"""The functions ``attention`` and ``attention_with_stats``."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src import placement
from attnlab._src.implementations.deferred import apply_deferred
from attnlab._src.implementations.reference import attend as reference_attend
from attnlab._src.implementations.tiled import Tiled
from attnlab._src.implementations.top_k import top_weights
from attnlab._src.masks.base import Mask
from attnlab._src.masks.bound import known_bound, structural_bound
from attnlab._src.masks.planning import plan_of
from attnlab._src.ops.derivative import run
from attnlab._src.ops.prepare import position_kinds_of, prepare
from attnlab._src.ops.sequence.run import run_sharded
from attnlab._src.ops.validate import (
    Arguments,
    Options,
    Settings,
    as_top_k,
    check,
    check_names,
)
from attnlab._src.placement import AUTOMATIC, names_of, shards_of
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionInputs,
    AttentionResult,
    Modifier,
    Score,
    accumulation_dtype,
)


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    score: Score | None = None,
    mask: Any = None,
    modifiers: Sequence[Modifier] = (),
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    query_offset: int | ArrayLike = 0,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> Array:
    """Attention: ``softmax(modifiers(score(query, key)) where mask) . value``.

    Args:
        query: ``[*batch, T, N, H]``: T queries, N heads of size H.
        key: ``[*batch, S, K, H]``: S keys, K heads; N is a multiple of K.
        value: ``[*batch, S, K, D]``: values of size D.
        score: the similarity of a query and a key; None: ``scores.scaled_dot()``.
        mask: which query may attend to which key: an attnlab mask, a boolean array that
            broadcasts to ``[*batch, N, T, S]`` (True = attend), or None: each query to
            every key.
        modifiers: changes of the logits, applied in this order, before the mask.
        sinks: ``[N]``, for each head the logit of an extra key that every query sees
            and whose value is zero; may be learned.
        dropout_rate: the fraction of weights set to 0, in [0, 1); others are scaled by
            ``1 / (1 - rate)``. The pattern is a pure function of (rng, example, head,
            query position, key position).
        dropout_rng: a PRNG key, needed where ``dropout_rate > 0``.
        query_offset: position of the first query, a scalar or ``[*batch]``, at least 0;
            if it is traced and negative, slots with a position below 0 are empty.
            Positions of keys start at 0.
        query_positions: the position of each query, ``[T]`` or ``[*batch, T]``
            integers from 0 to 2**31 - 1; -1 = empty slot.
        key_positions: the position of each key, ``[S]`` or ``[*batch, S]``, likewise.
            Integers that do not fit 32 bits are refused; traced ones are clipped.
        precision: of matrix products; None: ``jax.default_matmul_precision``.
        implementation: None for the automatic choice, or a name that
            :func:`attnlab.explain` lists; if the one named cannot run, there is an
            error, not another implementation.

    Returns:
        ``[*batch, T, N, D]`` in the query's dtype.

    Raises:
        TypeError, ValueError: on arguments that do not fit, naming the argument.
        NotImplementedError: if the implementation asked for cannot take the inputs, or
            does not run on the platform.

    Numerics:
        Logits, softmax and sums are float32 (float64 for float64 inputs). The output
        and the gradient of a query that may attend to no key are 0. A key that the mask
        hides from every query affects no output and no gradient, even if it is NaN.
        Reverse-mode differentiation works to second order; forward mode needs
        ``implementation="reference"`` and a score other than additive and concat.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import attention, masks
        >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
        >>> attention(x, x, x, mask=masks.causal() & masks.sliding_window(2, 2)).shape
        (1, 6, 2, 4)

    References:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2; Dao et al.,
        "FlashAttention", 2022, section 3.1 (the online softmax of the fast paths).
    """
    return attend(
        query,
        key,
        value,
        stats=False,
        score=score,
        mask=mask,
        modifiers=modifiers,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        query_offset=query_offset,
        query_positions=query_positions,
        key_positions=key_positions,
        precision=precision,
        implementation=implementation,
    ).output


def attention_with_stats(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    top_k: int | Literal["all"] | None = None,
    **options: Unpack[Options],
) -> AttentionResult:
    """As :func:`attention`, with log-sum-exp and, on request, the weights.

    Args:
        query: ``[*batch, T, N, H]``.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        top_k: None: no weights; "all": ``[*batch, N, T, S]``, dense and
            differentiable; k: the k greatest weights of each query with their key
            slots, in O(T k + S) memory and without a gradient.
        **options: every keyword argument of :func:`attention`.

    Returns:
        ``AttentionResult``. ``output`` does not depend on ``top_k``; ``lse``,
        ``[*batch, T, N]``, is differentiable.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab import attention_with_stats
        >>> x = jnp.ones((1, 3, 1, 4))
        >>> result = attention_with_stats(x, x, x, top_k=2)
        >>> result.output.shape, result.lse.shape, result.weights.shape
        ((1, 3, 1, 4), (1, 3, 1), (1, 1, 3, 2))
    """
    check_names("attention_with_stats", options)
    return attend(query, key, value, stats=True, top_k=top_k, **options)


def attend(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    stats: bool,
    top_k: int | Literal["all"] | None = None,
    **options: Unpack[Options],
) -> AttentionResult:
    """As :func:`attention_with_stats`; ``lse`` is None where ``stats`` is False."""
    args, settings = check(query, key, value, **options)
    top_k = as_top_k(top_k, key.shape[-3])
    return run_attention(args, settings.but(stats=stats, top_k=top_k))


def run_attention(args: Arguments, settings: Settings) -> AttentionResult:
    """The whole computation on validated arguments."""
    settings = settings.but(place=placement.place(), strategy=_strategy(args))
    if settings.strategy is not None:
        arrays = args.query, args.key, args.value
        traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
        settings = settings.but(bound=bound_of(args, data_are_known=traced))
    return compiled_attention(args, settings)


def _strategy(args: Arguments) -> str | None:
    """How keys reach queries; None if their lengths are not sharded alike."""
    strategy, place = placement.strategy(), placement.place()
    query, key = map(jax.typeof, (args.query, args.key))
    lengths = query.shape[-3], key.shape[-3]
    if strategy is not None and place is not None:
        shards = placement.shards_of(place)
    elif query.sharding.mesh.explicit_axes:
        axes = [names_of(x.sharding.spec[x.ndim - 3]) for x in (query, key)]
        if axes[0] != axes[1] or not axes[0]:
            return None
        shards = math.prod(query.sharding.mesh.shape[axis] for axis in axes[0])
        strategy = AUTOMATIC if shards > 1 else None
    else:
        return None
    return strategy if min(lengths) >= shards else None


def bound_of(args: Arguments, data_are_known: bool) -> Mask | None:
    """What is known of the mask before the program runs; None: nothing.

    Args:
        args: of the call.
        data_are_known: whether arrays of the mask that are no tracers may be read. They
            are constants of a program that is traced now; where nothing is traced they
            are arguments, and the program must not depend on them.
    """
    if position_kinds_of(args) != ("index", "index"):
        return None
    if data_are_known:
        return known_bound(args.mask)
    lengths = args.query.shape[-3], args.key.shape[-3]
    return structural_bound(args.mask, args.mask.operands(*lengths))


@functools.partial(jax.jit, static_argnames="settings")
def compiled_attention(args: Arguments, settings: Settings) -> AttentionResult:
    """As :func:`run_attention`, compiled once for a structure."""
    placed = _explicitly_placed(args, settings.top_k)
    if placed is not None:
        settings = settings.but(place=_flat(placed.lse))
    run_on: Any = functools.partial(_run, settings=settings)
    if placed is not None:
        run_on = jax.sharding.auto_axes(run_on, out_sharding=placed)
    found = run_on(args)
    # A -inf that the caller does not ask for would trip jax.debug_infs.
    return found if settings.stats else found._replace(lse=None)


def _explicitly_placed(args: Arguments, top_k: int | str | None) -> Any:
    """The shardings of the results on a mesh with explicit axes: those of the queries.

    The compiler shards the arrays in between, whose blocks depend on the mask. None
    where no axis is explicit.
    """
    types = [jax.typeof(x) for x in jax.tree.leaves(args)]
    meshes = [x.sharding.mesh for x in types if x.sharding.mesh.explicit_axes]
    if not meshes:
        return None
    query = jax.typeof(args.query)
    *batch, t, heads, _ = [*query.sharding.spec, *[None] * query.ndim][: query.ndim]

    def on(*axes: Any) -> Any:
        return NamedSharding(meshes[0], PartitionSpec(*batch, *axes))

    return AttentionResult(
        on(t, heads, None),
        on(t, heads),
        None if top_k is None else on(heads, t, None),
        None if top_k in (None, "all") else on(heads, t, None),
    )


def _flat(place: NamedSharding) -> NamedSharding:
    """Of ``[*batch, T, N]`` that of ``[B, T, N]``."""
    *batch, t, heads = place.spec
    first, rest = batch[:1], batch[1:]
    # A division of a later axis is none of their product.
    examples = first[0] if first and not any(rest) else None
    return NamedSharding(place.mesh, PartitionSpec(examples, t, heads))


def _run(args: Arguments, settings: Settings) -> AttentionResult:
    batch = args.query.shape[:-3]
    t, heads = args.query.shape[-3:-1]
    if 0 in (*batch, t, heads, args.key.shape[-3]):
        args.mask.operands(t, args.key.shape[-3])
        return _nothing(args, settings.top_k)
    inputs = prepare(args, settings)
    output, lse = _passes(inputs, settings)
    weights, indices = _weights(inputs, lse, settings.top_k)
    if args.sinks is not None:
        total = _with_sinks(lse, args.sinks)
        finite = jnp.where(jnp.isneginf(total), 0, total)
        share = jnp.exp(lse - finite)
        output = output * share[..., None]
        if weights is not None:
            weights = weights * share.swapaxes(1, 2)[..., None]
        lse = total
    output = output.astype(args.query.dtype)
    found = AttentionResult(output, lse, weights, indices)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)


def _passes(inputs: AttentionInputs, settings: Settings) -> tuple[Array, Array]:
    name, place = settings.implementation, settings.place
    if settings.strategy is None or place is None or shards_of(place) == 1:
        return run(inputs, name, place)
    return run_sharded(inputs, name, place, settings.strategy, settings.bound)


def _nothing(args: Arguments, top_k: int | str | None) -> AttentionResult:
    """The result where there is no query, no key or no example."""
    *batch, t, heads, _ = args.query.shape
    s, size = args.key.shape[-3], args.value.shape[-1]
    wide = accumulation_dtype(args.query.dtype)
    lse = jnp.full((*batch, t, heads), -jnp.inf, wide)
    if args.sinks is not None:
        lse = _with_sinks(lse, args.sinks)
    weights, indices = None, None
    if top_k == "all":
        weights = jnp.zeros((*batch, heads, t, s), wide)
    elif top_k is not None:
        shape = (*batch, heads, t, int(top_k))
        weights, indices = jnp.zeros(shape, wide), jnp.full(shape, -1, jnp.int32)
    output = jnp.zeros((*batch, t, heads, size), args.query.dtype)
    return AttentionResult(output, lse, weights, indices)


def _with_sinks(lse: Array, sinks: Array) -> Array:
    """Log-sum-exp ``[B, T, N]`` with a sink ``[N or 1]`` that every query sees."""
    sinks = jnp.broadcast_to(jnp.asarray(sinks).astype(lse.dtype), lse.shape)
    # Where both are -inf, so is the result, and its gradient is 0, not 0 / 0.
    nothing = jnp.isneginf(lse) & jnp.isneginf(sinks)
    lse, sinks = (jnp.where(nothing, 0, x) for x in (lse, sinks))
    return jnp.where(nothing, -jnp.inf, jnp.logaddexp(lse, sinks))


def _weights(
    inputs: AttentionInputs, lse: Array, top_k: int | str | None
) -> tuple[Array | None, Array | None]:
    if top_k is None:
        return None, None
    if top_k == "all":
        return reference_attend(inputs)[2], None
    plan = plan_of(inputs, Tiled().block_sizes(inputs), cols=False)
    return top_weights(apply_deferred(inputs), plan, lse, int(top_k))
