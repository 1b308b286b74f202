"""Small pictures that a notebook shows of masks, plans and weights."""

import html
from typing import Any

import jax
import numpy as np

#: Queries and keys in the picture of a mask, and cells at most of any side.
POSITIONS, _MOST = 48, 96
#: Pixels of a side, about, and shades.
_SIDE, _SHADES = 192, 8


def picture_of(caption: str, shades: np.ndarray) -> str:
    """An SVG with a caption, in the colours of the page around it.

    Args:
        caption: text; as the picture's name it is read aloud.
        shades: ``[rows, columns]``, booleans or 0 (empty) to 1 (full). More than 96
            rows or columns are joined; a joint cell has its greatest shade.
    """
    shades = _joined(_joined(np.asarray(shades, np.float32)).T).T
    levels = np.ceil(np.clip(shades, 0, 1) * _SHADES).astype(np.int8)
    paths = "".join(
        f'<path d="{path}" opacity="{0.75 * level / _SHADES:.2f}"/>'
        for level in range(1, _SHADES + 1)
        if (path := _cells(levels == level))
    )
    rows, columns = levels.shape
    pixels = max(2, min(16, _SIDE // max(rows, columns, 1)))
    text = html.escape(caption)
    return (
        f'<figure style="margin: 0"><svg width="{columns * pixels}" '
        f'height="{rows * pixels}" viewBox="0 0 {columns} {rows}" role="img" '
        f'aria-label="{text}" fill="currentColor" shape-rendering="crispEdges">'
        f'<rect width="100%" height="100%" opacity="0.08"/>{paths}</svg>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def picture_of_plan(plan: Any) -> str | None:
    """The blocks of a plan, full ones dark; None if it is traced."""
    if not plan.is_static:
        return None
    blocks = -(-plan.key_length // plan.block_k)
    full, partial = (touched(part, blocks, _MOST) for part in plan.rows)
    shades = np.maximum(full, partial / 2)
    counts = [int(part.per_row()[0, 0].sum()) for part in plan.rows]
    more = _more(plan.rows.per_row().shape[:2])
    lengths = f"{plan.query_length:,} queries (down), {plan.key_length:,} keys"
    return picture_of(
        f"Plan{more}: {lengths}, in blocks of {plan.block_q} x {plan.block_k}; "
        f"{counts[0]:,} full and {counts[1]:,} partial of {len(shades) * blocks:,}; "
        "attnlab.show(plan) zooms",
        shades,
    )


def touched(intervals: Any, blocks: int, most: int) -> np.ndarray:
    """Which cells of blocks the rows of a plan touch, in head 0 of example 0.

    Args:
        intervals: the full or the partial blocks of each row, NumPy arrays.
        blocks: number of blocks of keys.
        most: number of cells at most; a cell is as many blocks as that takes.

    Returns:
        Boolean ``[rows, cells]``.
    """
    each = max(1, -(-blocks // most))
    first = each * np.arange(-(-blocks // each))
    lo, hi = (x[0, 0][..., None] for x in intervals)
    return ((lo < first + each) & (first < hi) & (lo < hi)).any(1)


def picture_of_weights(result: Any) -> str | None:
    """The weights of one head; None without weights, or if they are traced or NaN."""
    weights, indices = result.weights, result.indices
    if weights is None or isinstance(weights, jax.core.Tracer) or not weights.size:
        return None
    first = (0,) * (weights.ndim - 2)
    more = _more(weights.shape[:-2])
    shades = np.asarray(weights[first], np.float32)
    if not np.isfinite(shades).all():
        return None
    if indices is not None:
        slots, whole = np.asarray(indices[first]), shades
        rows, ranks = np.nonzero(slots >= 0)
        shades = np.zeros((len(whole), slots.max(initial=0) + 1), np.float32)
        shades[rows, slots[rows, ranks]] = whole[rows, ranks]
        more += f", the {whole.shape[1]} greatest of each query"
    queries, keys = shades.shape
    caption = f"Attention weights{more}: {queries:,} queries (down), {keys:,} keys"
    top = max(float(shades.max()), 1e-9)
    return picture_of(
        f"{caption}; darkest: {top:.2g}; attnlab.show_weights shows all", shades / top
    )


def _more(others: tuple[int, ...]) -> str:
    return " of head 0 of example 0" if any(n > 1 for n in others) else ""


def _cells(where: np.ndarray) -> str:
    """The outline of the cells that are True, run by run."""
    runs = []
    for row, cells in enumerate(np.pad(where, ((0, 0), (1, 1))).astype(np.int8)):
        starts, stops = (np.flatnonzero(np.diff(cells) == step) for step in (1, -1))
        for start, stop in zip(starts, stops, strict=True):
            runs.append(f"M{start} {row}h{stop - start}v1H{start}z")
    return "".join(runs)


def _joined(shades: np.ndarray) -> np.ndarray:
    """At most ``_MOST`` rows, each the maximum of as many as needed."""
    each = -(-len(shades) // _MOST)
    if each <= 1:
        return shades
    padded = np.pad(shades, ((0, -len(shades) % each), (0, 0)))
    return padded.reshape(-1, each, shades.shape[1]).max(1)
