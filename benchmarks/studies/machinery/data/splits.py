"""Splits pairs into training, development and test parts without common text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.studies.machinery.data.pairs import Pair
from benchmarks.studies.machinery.errors import StudyError


class Split(NamedTuple):
    """Pairs for training, development and test; a group is in one part only.

    Attributes:
        train: pairs to train on.
        dev: pairs for choices, such as of the learning rate.
        test: pairs for the test.
        duplicates: pairs that were dropped from ``train`` (or ``dev``) because one of
            their sides occurs in ``dev`` or ``test`` (or ``test``).
    """

    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]
    duplicates: int


def _sides(pairs: Sequence[Pair]) -> set[str]:
    return {_plain(side) for p in pairs for side in (p.source, p.target)}


def _plain(text: str) -> str:
    """The words of a text, without case and punctuation, to find duplicates."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _without(pairs: Sequence[Pair], known: set[str]) -> list[Pair]:
    return [
        p for p in pairs if not {_plain(p.source), _plain(p.target)}.intersection(known)
    ]


def split(
    pairs: Sequence[Pair], *, test: int = 1000, dev: int = 700, seed: int = 0
) -> Split:
    """Holds out whole groups, drawn at random, until there are enough pairs.

    Args:
        pairs: the pairs, with their groups.
        test: about how many pairs for the test; at most about a tenth of all.
        dev: about how many pairs for development; at most about a tenth of all.
        seed: seed of the draw.

    Raises:
        StudyError: if there are too few groups to hold any out.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, []).append(pair)
    names = list(groups)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    parts: list[list[Pair]] = []
    for wanted in (test, dev):
        part: list[Pair] = []
        while order and len(part) < min(wanted, len(pairs) // 10):
            part += groups[order.pop()]
        parts.append(part)
    rest = set(order)
    train = [p for p in pairs if p.group in rest]
    tested, chosen = parts
    kept_dev = _without(chosen, _sides(tested))
    kept = _without(train, _sides(tested) | _sides(chosen))
    if not (kept and kept_dev and tested):
        raise StudyError(
            f"expected enough different pairs to hold out some for development and "
            f"test, got {len(pairs):,} in {len(groups):,} groups"
        )
    duplicates = len(train) - len(kept) + len(chosen) - len(kept_dev)
    return Split(kept, kept_dev, tested, duplicates)
