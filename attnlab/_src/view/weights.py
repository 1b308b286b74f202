"""What a page shows of attention weights: the greatest of each query."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnlab._src.types import ArrayLike, AttentionResult
from attnlab._src.view.masks import packed

#: Weights that a page holds at most, and of one query.
_MOST, _MOST_OF_QUERY = 2**20, 64
#: The greatest weight of a layer; weights are stored as whole numbers of 16 bits.
_MOST_STORED = 65535


def content_of_weights(
    layers: Mapping[str, AttentionResult | ArrayLike],
    tokens: Sequence[str] | None,
    key_tokens: Sequence[str] | None,
    example: int,
) -> dict[str, Any]:
    """All that a page needs to draw weights, as JSON.

    Raises:
        TypeError: if a layer is no result of attention, or tokens are no strings.
        ValueError: if a layer has no weights, or numbers do not fit.
    """
    labels = tokens if key_tokens is None else key_tokens
    known = 0 if labels is None or not _is_text(labels) else len(labels)
    read = {name: _weights(name, each, example, known) for name, each in layers.items()}
    entries = sum(w.shape[0] * w.shape[1] for w, _, _ in read.values())
    kept = max(1, min(_MOST_OF_QUERY, _MOST // max(entries, 1)))
    found = [_layer(name, *each, kept) for name, each in read.items()]
    return {
        "layers": found,
        "tokens": _labels("tokens", tokens, "queries", found),
        "keyTokens": _labels(
            "tokens" if key_tokens is None else "key_tokens",
            labels,
            "keys",
            found,
        ),
    }


def _weights(
    name: str, result: AttentionResult | ArrayLike, example: int, known: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Weights and key slots ``[N, T, k]`` of one example, and S.

    A result with slots does not tell S: it is at least ``known``.
    """
    given, indices = _parts(name, result)
    if isinstance(given, jax.core.Tracer):
        raise ValueError(f"results: {name} is traced; show it outside of jit")
    weights = np.asarray(given, np.float32)
    if not np.isfinite(weights).all():
        raise ValueError(f"results: {name} has weights that are not finite")
    weights = weights.reshape(-1, *weights.shape[-3:])
    if not 0 <= example < len(weights):
        raise ValueError(
            f"example: expected 0 to {len(weights) - 1} for {name}, got {example}"
        )
    weights = weights[example]
    if indices is None:
        slots = np.arange(weights.shape[-1])
        return weights, np.broadcast_to(slots, weights.shape), weights.shape[-1]
    indices = np.asarray(indices)
    indices = indices.reshape(-1, *indices.shape[-3:])[example]
    return weights, indices, max(int(indices.max(initial=0)) + 1, known)


def _parts(
    name: str, result: AttentionResult | ArrayLike
) -> tuple[ArrayLike, ArrayLike | None]:
    """Weights ``[*batch, N, T, k]``, and their key slots or None."""
    if isinstance(result, AttentionResult):
        if result.weights is None:
            raise ValueError(
                f"results: {name} has no weights; attention_with_stats(..., top_k=64) "
                'or top_k="all" returns them'
            )
        return result.weights, result.indices
    if not isinstance(result, (jax.Array, np.ndarray)) or result.ndim not in (3, 4):
        raise TypeError(
            f"results: expected AttentionResult for {name}, or its weights "
            f"[B, N, T, S] or [B, T, S], got {_said(result)}; "
            "attention_with_stats(..., top_k=64) returns one"
        )
    return (result if result.ndim == 4 else result[:, None]), None


def _said(x: Any) -> str:
    kind = type(x).__name__
    return f"{kind} of shape {tuple(x.shape)}" if hasattr(x, "shape") else kind


def _layer(
    name: str, weights: np.ndarray, indices: np.ndarray, keys: int, kept: int
) -> dict[str, Any]:
    """The greatest weights of a layer, at most ``kept`` of each query."""
    count = min(kept, weights.shape[-1])
    greatest = np.argsort(-weights, -1, kind="stable")[..., :count]
    indices = np.take_along_axis(indices, greatest, -1).astype(np.int32)
    weights = np.where(indices < 0, 0, np.take_along_axis(weights, greatest, -1))
    # After dropout weights may be greater than 1.
    unit = max(1.0, float(weights.max(initial=0))) / _MOST_STORED
    weights = np.rint(np.maximum(weights, 0) / unit).astype(np.uint16)
    return {
        "name": name,
        "heads": weights.shape[0],
        "queries": weights.shape[1],
        "keys": keys,
        "kept": count,
        "unit": unit,
        "weights": packed(weights),
        "indices": packed(indices),
    }


def _is_text(tokens: Any) -> bool:
    return isinstance(tokens, (list, tuple)) and all(isinstance(x, str) for x in tokens)


def _labels(
    name: str,
    tokens: Sequence[str] | None,
    side: str,
    layers: Sequence[Mapping[str, Any]],
) -> list[str] | None:
    if tokens is None:
        return None
    if not _is_text(tokens):
        raise TypeError(f"{name}: expected a list of strings, one for each token")
    longest = max(each[side] for each in layers)
    if len(tokens) < longest:
        raise ValueError(
            f"{name}: expected {longest} strings, one for each token, got {len(tokens)}"
        )
    return [*tokens]
