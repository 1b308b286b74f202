"""An ``attention_fn`` for Flax's own multi-head attention, Linen and NNX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.structural import causal
from attnlab._src.ops.attention import run_attention
from attnlab._src.ops.drop_in import all_of, as_array, as_bias, as_visible
from attnlab._src.ops.validate import Arguments, Settings, check
from attnlab._src.types import Array, ArrayLike, Modifier, Score


def attention_fn(
    *,
    score: Score | None = None,
    mask: Mask | ArrayLike | None = None,
    modifiers: Sequence[Modifier] = (),
    sinks: ArrayLike | None = None,
    implementation: str | None = None,
) -> Callable[..., Array]:
    """Makes an attention function to pass to Flax as ``attention_fn=``.

    It works with ``flax.linen.MultiHeadDotProductAttention``,
    ``flax.linen.MultiHeadAttention`` and ``flax.nnx.MultiHeadAttention``: parameters,
    caches and calls stay Flax's. Without arguments it computes what Flax computes.

    While decoding (one query, several keys, and the mask that Flax makes of its cache)
    the position of the query is taken from that mask: the last key that it shows, in
    each example. Causality, ``mask`` and ``modifiers`` use this position. A mask that
    you pass to the call must therefore not hide the current key.

    Args:
        score: score function; scaled dot product if not given.
        mask: attnlab mask or boolean array, combined with those of the call. A call
            may also pass an attnlab mask, if Flax hands it on (not while decoding).
        modifiers: applied to the logits in this order, before Flax's ``bias``.
        sinks: ``[N]`` logits of an extra key that every query attends to and whose
            value is zero.
        implementation: see :func:`attnlab.attention`.

    Returns:
        A function with the arguments of Flax's ``dot_product_attention`` (Linen's and
        NNX's together). Arguments that replace Flax's einsum raise an error, as attnlab
        has no such einsum. Arrays in ``score``, ``modifiers``, ``mask`` and ``sinks``
        are constants of the function: to learn them, make the function, and the module
        that holds it, from the parameters inside the function that you differentiate.

    Numerics:
        Softmax is float32 (float64 for float64), whatever ``force_fp32_for_softmax``
        is. A query that may attend to nothing yields 0 and weights 0 (in Flax: the mean
        of the values). Dropout has Flax's distribution, but other random numbers; with
        ``broadcast_dropout`` all examples and heads share one pattern. Weights are
        sown as they are before dropout, as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen, nnx
        >>> from attnlab import masks, modifiers, nn
        >>> attend = nn.attention_fn(
        ...     mask=masks.causal(), modifiers=[modifiers.soft_cap(20.0)]
        ... )
        >>> x = jnp.ones((2, 10, 32))
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 32, attention_fn=attend, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> layer(x).shape
        (2, 10, 32)
        >>> layer = linen.MultiHeadAttention(4, attention_fn=attend)
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (2, 10, 32)
    """
    own = None if mask is None else as_mask(mask)

    def attend(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: PrecisionLike = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Array:
        _refuse(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        rate = 0.0 if deterministic else dropout_rate
        args, settings = check(
            query,
            key,
            value,
            score=score,
            modifiers=modifiers,
            sinks=sinks,
            dropout_rate=rate,
            dropout_rng=dropout_rng,
            precision=precision,
            implementation=implementation,
        )
        *batch, t, heads, _ = query.shape
        full = (*batch, heads, t, key.shape[-3])
        extra = mask
        if mask is not None and not isinstance(mask, Mask):
            # Flax makes masks of any dtype; nonzero means visible.
            visible = as_array("mask", mask).astype(bool)
            extra = as_visible(visible, full)
            if t == 1 and key.shape[-3] > 1:
                args = args._replace(query_offset=_last_visible(visible, full))
        args = args._replace(mask=all_of(own, causal() if is_causal else None, extra))
        if bias is not None:
            args = args._replace(modifiers=(*args.modifiers, as_bias(bias, full)))
        if module is not None:
            _sow(module, args, settings)
        shared = bool(broadcast_dropout)
        return run_attention(args, settings.but(shared_dropout=shared)).output

    return attend


def _refuse(**replacements: object) -> None:
    for name, replacement in replacements.items():
        if replacement is not None:
            raise NotImplementedError(
                f"{name}: attnlab's tiles have no einsum to replace; leave it (and the "
                "module's *_einsum_cls) out, or use Flax's own attention function"
            )


def _last_visible(mask: Array, full: tuple[int, ...]) -> Array:
    """The position ``[*batch]`` of the one query: the last key visible in any head."""
    *batch, _, _, length = full
    mask = jnp.broadcast_to(mask, (*(1,) * (len(full) - mask.ndim), *mask.shape))
    slots = jnp.arange(length, dtype=jnp.int32)
    last = jnp.where(mask, slots, 0).max((-3, -2, -1))
    return jnp.broadcast_to(last, batch)


def _sow(module: Any, args: Arguments, settings: Settings) -> None:
    """Sows all weights ``[*batch, N, T, S]``, as they are before dropout."""
    all_weights = Settings(
        precision=settings.precision,
        implementation="reference",
        stats=True,
        top_k="all",
    )
    weights = run_attention(args._replace(dropout_rng=None), all_weights).weights
    kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(kind, "attention_weights", jnp.asarray(weights, args.query.dtype))
