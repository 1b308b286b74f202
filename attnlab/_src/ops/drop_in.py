"""A function with the signature of ``jax.nn.dot_product_attention``."""

import functools
import operator
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.base import Mask, dense
from attnlab._src.masks.base import full as full_mask
from attnlab._src.masks.data import lengths
from attnlab._src.masks.structural import causal, sliding_window
from attnlab._src.modifiers.bias import bias as as_modifier
from attnlab._src.ops.attention import run_attention
from attnlab._src.ops.validate import check, check_fits
from attnlab._src.scores.inner import ScaledDot
from attnlab._src.types import Array, ArrayLike, Modifier


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: Literal[False] = ...,
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: Literal[True],
) -> tuple[Array, Array]: ...


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """``jax.nn.dot_product_attention``, with the same arguments, computed by attnlab.

    Causality and windows are static structure: dead blocks are skipped, forward and
    backward, and no ``[T, S]`` array is made.

    Args:
        query: ``[B, T, N, H]`` or ``[T, N, H]``.
        key: ``[B, S, K, H]`` or ``[S, K, H]``; N is a multiple of K.
        value: ``[B, S, K, D]`` or ``[S, K, D]``.
        bias: added to the logits; broadcasts to ``[B, N, T, S]``.
        mask: booleans, True = attend; broadcasts to ``[B, N, T, S]``.
        scale: a scalar factor of the logits; ``1 / sqrt(H)`` if not given.
        is_causal: query t sees keys 0 to t.
        query_seq_lengths: how many queries are used, integers ``[B]``; others yield 0.
        key_value_seq_lengths: how many keys are used, integers ``[B]``; others are
            hidden.
        local_window_size: (left, right), or one number for both: query t sees keys
            ``t - left`` to ``t + right``.
        implementation: None for attnlab's automatic choice, or a name that
            :func:`attnlab.explain` lists. "xla" means "tiled", whose programs XLA
            compiles; "cudnn" is refused.
        return_residual: whether to return log-sum-exp, too.

    Returns:
        ``[B, T, N, D]`` or ``[T, N, D]`` in the query's dtype; with ``return_residual``
        also log-sum-exp ``[B, T, N]`` or ``[T, N]`` in that dtype, without a gradient.

    Raises:
        TypeError, ValueError: on arguments that do not fit, naming the argument.
        NotImplementedError: for "cudnn", or if the implementation asked for cannot
            take the inputs.

    Numerics:
        Some results differ from those of ``jax.nn``. A query that sees no key has
        output 0, gradient 0 and residual -inf (in ``jax.nn``: the mean of the values,
        and a large negative residual). A key that the mask hides from every query
        affects nothing, even if it is NaN. Softmax is float64 for float64 inputs. The
        weights of 16-bit inputs are float32, unless a kernel rounds them for a product
        (at JAX's default precision).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import dot_product_attention
        >>> query = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
        >>> key = value = jax.random.normal(jax.random.key(1), (2, 6, 2, 8))
        >>> options = dict(is_causal=True, local_window_size=(3, 0))
        >>> ours = dot_product_attention(query, key, value, **options)
        >>> theirs = jax.nn.dot_product_attention(query, key, value, **options)
        >>> bool(jnp.allclose(ours, theirs, atol=1e-5))
        True
    """
    q, k, v = (
        _four_axes(name, x, letters)
        for name, x, letters in (
            ("query", query, "[B, T, N, H] or [T, N, H]"),
            ("key", key, "[B, S, K, H] or [S, K, H]"),
            ("value", value, "[B, S, K, D] or [S, K, D]"),
        )
    )
    for name, flag in (("is_causal", is_causal), ("return_residual", return_residual)):
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(
                f"{name}: expected a bool (it must not be traced), got {flag!r}"
            )
    if implementation == "cudnn":
        raise NotImplementedError(
            "implementation: 'cudnn' is jax.nn's own kernel; use None for attnlab's "
            "automatic choice, or call jax.nn.dot_product_attention"
        )
    implementation = "tiled" if implementation == "xla" else implementation
    args, settings = check(
        q,
        k,
        v,
        score=ScaledDot(_scale(scale)),
        implementation=implementation,
    )
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    args = args._replace(
        mask=all_of(
            _band(bool(is_causal), local_window_size),
            _lengths(query_seq_lengths, key_value_seq_lengths, q.shape[0]),
            None if mask is None else as_visible(as_array("mask", mask), full),
        ),
        modifiers=() if bias is None else (as_bias(bias, full),),
    )
    found = run_attention(args, settings.but(stats=bool(return_residual)))
    lead = q.shape[:-1] if np.ndim(query) == 4 else q.shape[1:-1]
    output = found.output.reshape(*lead, v.shape[-1])
    if not return_residual:
        return output
    lse = found.lse.astype(output.dtype).reshape(lead)
    return output, jax.lax.stop_gradient(lse)


def all_of(*masks: Mask | None) -> Mask:
    """The conjunction of the masks; None stands for no mask."""
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, given) if given else full_mask()


def as_array(name: str, x: Any) -> Array:
    """``jnp.asarray(x)``, or an error that names the argument.

    Raises:
        TypeError: if it is no array.
    """
    if not hasattr(x, "dtype") and not isinstance(x, (bool, int, float, list, tuple)):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
    return jnp.asarray(x)


def as_visible(mask: Array, full: tuple[int, ...]) -> Mask:
    """A boolean array that broadcasts to ``full``, ``[*batch, N, T, S]``, as a mask."""
    check_fits("mask", mask.shape, full)
    return dense(jnp.atleast_2d(mask))


def as_bias(bias: ArrayLike, full: tuple[int, ...]) -> Modifier:
    """An array that broadcasts to ``full``, ``[*batch, N, T, S]``, as a modifier."""
    bias = as_array("bias", bias)
    check_fits("bias", bias.shape, full)
    if jnp.issubdtype(bias.dtype, jnp.integer):
        bias = bias.astype(jnp.float32)
    return as_modifier(bias)


def _four_axes(name: str, x: ArrayLike, letters: str) -> Array:
    x = as_array(name, x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: expected {letters}, got shape {x.shape}")
    return x if x.ndim == 4 else x[None]


def _band(is_causal: bool, window: int | tuple[int, int] | None) -> Mask | None:
    """Causality and window as one band of offsets."""
    if window is None:
        return causal() if is_causal else None
    sizes = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sizes) != 2 or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0
        for n in sizes
    ):
        raise ValueError(
            "local_window_size: expected an int of at least 0, or two, (left, right); "
            f"got {window!r}"
        )
    left, right = sizes
    return sliding_window(left, 0 if is_causal else right)


def _lengths(query: ArrayLike | None, key: ArrayLike | None, batch: int) -> Mask | None:
    if query is None and key is None:
        return None
    return lengths(
        _length("query_seq_lengths", query, batch),
        _length("key_value_seq_lengths", key, batch),
    )


def _length(name: str, given: ArrayLike | None, batch: int) -> Array | None:
    if given is None:
        return None
    given = arguments.integers(name, given)
    if given.shape != (batch,):
        raise ValueError(
            f"{name}: expected one length for each example, shape {(batch,)}, "
            f"got {given.shape}"
        )
    return given


def _scale(scale: jax.typing.ArrayLike | None) -> Array | None:
    """A number or a scalar as an array, so that a new scale does not recompile."""
    if scale is None:
        return None
    scale = as_array("scale", scale)
    if scale.ndim:
        raise ValueError(f"scale: expected a scalar, got shape {scale.shape}")
    return scale
