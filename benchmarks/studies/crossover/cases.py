"""Which masks are measured at which lengths."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from attnlab import masks
from attnlab.masks import Mask

HEADS, HEAD_SIZE = 8, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
#: Positions in a block of the random patterns.
BLOCK = 64
#: Patterns with about 385 visible keys per query, whatever the length.
PATTERNS: dict[str, Callable[[int], Mask]] = {
    "window": lambda length: masks.sliding_window(192, 192),
    "causal window": lambda length: masks.sliding_window(384, 0),
    "anchor": lambda length: masks.anchor(192),
    "random": lambda length: _random(6, length),
    "window+random": lambda length: masks.sliding_window(96, 96) | _random(3, length),
    "window+anchor": lambda length: masks.longformer(window=96, anchors=96),
    "all three": lambda length: (
        masks.longformer(window=64, anchors=64) | _random(2, length)
    ),
    "dilated": lambda length: masks.dilated_window(768, 768, 4),
}
#: The dense masks to compare with: causal patterns are compared with "causal".
DENSE = {"full": masks.full(), "causal": masks.causal()}
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
DIRECTIONS = ("forward", "training")
#: Cycles from the TPU's compiler: bfloat16, eight heads of 128, forward.
TARGET, TPU_LENGTHS = "tpu:v5e", (512, 1024, 2048, 4096, 8192, 16384)
TPU_PATTERNS = ("full", "causal", "window", "causal_window")


def _random(count: int, length: int) -> Mask:
    blocks = max(length // BLOCK, 1)
    return masks.random_blocks(0, min(count, blocks), BLOCK, blocks)


class Case(NamedTuple):
    """One mask at one length.

    Attributes:
        series: the line of a chart that it belongs to.
        length: T.
        mask: the mask.
    """

    series: str
    length: int
    mask: Mask

    @property
    def name(self) -> str:
        return f"{self.series} at {self.length}"


def groups_of(quick: bool) -> list[list[Case]]:
    """The cases of each length; those of one length include several densities."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    groups = []
    for length in lengths:
        group = [Case(name, length, mask) for name, mask in DENSE.items()]
        group += [Case(name, length, make(length)) for name, make in PATTERNS.items()]
        if length == lengths[-2]:
            group += by_density(length, SHARES[2:4] if quick else SHARES)
        groups.append(group)
    return groups


def by_density(length: int, shares: Sequence[float]) -> Iterator[Case]:
    """A window and random blocks for each share of the pairs."""
    for share in shares:
        # A window of w to each side of T words shows 2 w / T - (w / T)^2 of the pairs.
        width = max(round((1 - (1 - share) ** 0.5) * length), 1)
        yield Case(f"window of {share:.1%}", length, masks.sliding_window(width, width))
        blocks = max(round(share * length / BLOCK), 1)
        yield Case(f"random of {share:.1%}", length, _random(blocks, length))
