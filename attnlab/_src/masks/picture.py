"""A small picture of a mask, which a notebook shows beside its expression."""

import html

import numpy as np

#: Queries and keys of the picture.
POSITIONS = 48
#: Pixels for each.
_PIXELS = 4


def picture_of(text: str, seen: np.ndarray) -> str:
    """An SVG of visible pairs with a caption, in the colours of the page around it.

    Args:
        text: the expression of the mask.
        seen: boolean ``[T, S]``.
    """
    rows = []
    for t, row in enumerate(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8)):
        starts, stops = (np.flatnonzero(np.diff(row) == step) for step in (1, -1))
        for start, stop in zip(starts, stops, strict=True):
            rows.append(f"M{start} {t}h{stop - start}v1H{start}z")
    queries, keys = seen.shape
    return (
        f'<figure style="margin: 0"><svg width="{keys * _PIXELS}" '
        f'height="{queries * _PIXELS}" viewBox="0 0 {keys} {queries}" role="img" '
        f'aria-label="visible pairs of {html.escape(text)}">'
        '<rect width="100%" height="100%" fill="currentColor" opacity="0.08"/>'
        f'<path d="{"".join(rows)}" fill="currentColor" opacity="0.75"/></svg>'
        f"<figcaption><code>{html.escape(text)}</code>: {queries} queries (down), "
        f"{keys} keys; <code>attnlab.show</code> draws any length</figcaption></figure>"
    )
