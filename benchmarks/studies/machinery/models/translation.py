"""Translating a test set in batches of few shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.studies.machinery.data.batches import LENGTHS, pad

#: ``(source [B, S], source_lengths [B]) -> tokens [B, L]``: each row up to its END.
TranslateBatch = Callable[[np.ndarray, np.ndarray], Any]


def padded_length(tokens: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The least of the lengths that has room; twice the longest, and so on, beyond."""
    for length in lengths:
        if tokens <= length:
            return length
    length = max(lengths)
    while length < tokens:
        length *= 2
    return length


def translate(
    sources: Sequence[Sequence[int]],
    translate_batch: TranslateBatch,
    *,
    tokens: int = 4096,
    lengths: Sequence[int] = LENGTHS,
    devices: int = 1,
) -> list[np.ndarray]:
    """Translates every source, those of about the same length together.

    Args:
        sources: tokens, without END.
        translate_batch: compiled once for each shape; greedy or beam search with any
            model (``over_batch`` divides it among
            devices). Of beams it returns the best.
        tokens: padded source tokens of a batch, at most (but a row for each device).
        lengths: that sources are padded to; longer ones are translated, too.
        devices: rows are a multiple of it.

    Returns:
        Tokens for each source, in the order given.
    """
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(sources)), key=lambda i: len(sources[i])):
        length = padded_length(len(sources[index]) + 1, lengths)
        groups.setdefault(length, []).append(index)
    found: dict[int, np.ndarray] = {}
    for length, members in groups.items():
        rows = max(tokens // length // devices, 1) * devices
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            batch = pad([(sources[i], ()) for i in part], rows, length)
            output = np.asarray(
                translate_batch(
                    np.asarray(batch.source), np.asarray(batch.source_lengths)
                )
            )
            if output.ndim != 2 or len(output) != rows:
                raise ValueError(
                    f"translate_batch: expected to return [{rows}, L], got "
                    f"{output.shape}"
                )
            found.update(zip(part, output, strict=False))
    return [found[i] for i in range(len(sources))]
