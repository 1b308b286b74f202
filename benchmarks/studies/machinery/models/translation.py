"""Translates a test set in batches of few shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.studies.machinery.data.batches import LENGTHS, pad

#: ``(source [B, S], source_lengths [B]) -> tokens [B, L]``; rows count up to END.
TranslateBatch = Callable[[np.ndarray, np.ndarray], Any]


def padded_length(tokens: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest of ``lengths`` that holds so many tokens.

    Beyond the longest, that length is doubled until it suffices.
    """
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
    """Translates every source, in batches of similar lengths.

    Args:
        sources: tokens, without END.
        translate_batch: translates one batch; it is called with few different shapes.
        tokens: the most padded source tokens of a batch, but at least one row for each
            device.
        lengths: the lengths that sources are padded to; longer sources get longer ones.
        devices: the number of rows is a multiple of it.

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
