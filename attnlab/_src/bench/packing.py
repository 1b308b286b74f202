"""Packs documents into sequences, and embeds them as query, key and value."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attnlab._src.types import Array


class Packed(NamedTuple):
    """Sequences of documents, without gaps between them.

    Attributes:
        tokens: ``[B, T]`` uint8, bytes of text.
        ids: ``[B, T]`` int32, the number of the document within its sequence.
    """

    tokens: np.ndarray
    ids: np.ndarray


def pack(documents: Sequence[bytes], batch: int, length: int, seed: int = 0) -> Packed:
    """Fills ``batch`` sequences of ``length`` bytes with documents in random order.

    The last document of a sequence is cut at the sequence's end. If the text is too
    short, documents are used again.

    Args:
        documents: byte strings; empty ones are left out.
        batch: B, the number of sequences.
        length: T, the length of a sequence in bytes.
        seed: seed of the order.

    Raises:
        ValueError: if every document is empty.
    """
    usable = [d for d in documents if d]
    if not usable:
        raise ValueError("documents: expected some text, got none")
    random = np.random.default_rng(seed)
    tokens = np.zeros((batch, length), np.uint8)
    ids = np.zeros((batch, length), np.int32)
    order: list[int] = []
    for row in range(batch):
        filled = number = 0
        while filled < length:
            if not order:
                order = random.permutation(len(usable)).tolist()
            piece = usable[order.pop()][: length - filled]
            stop = filled + len(piece)
            tokens[row, filled:stop] = np.frombuffer(piece, np.uint8)
            ids[row, filled:stop] = number
            filled, number = stop, number + 1
    return Packed(tokens, ids)


def embed(
    tokens: np.ndarray,
    heads: int,
    head_size: int,
    dtype: str,
    random: np.random.Generator,
) -> Array:
    """Embeds bytes with a random table.

    Args:
        tokens: ``[B, T]`` uint8.
        heads: number of heads, N or K.
        head_size: H, the size of a head.
        dtype: type of the result.
        random: generator for the table ``[256, heads * H]`` of standard normal numbers.

    Returns:
        ``[B, T, heads, H]``.
    """
    table = random.standard_normal((256, heads * head_size), np.float32)
    vectors = table[tokens].reshape(*tokens.shape, heads, head_size)
    return jnp.asarray(vectors, dtype)
