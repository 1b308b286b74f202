"""Measured timings, a small file: ``explain`` quotes them, block sizes follow them.

``benchmarks.studies crossover`` writes it. Only ratios of its numbers matter, so that
it serves other machines of its kind, too.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

#: A file that takes the place of the one that comes with the library.
VARIABLE = "ATTNLAB_MEASURED"
_FILE = Path(__file__).with_name("measured.json")


class Fit(NamedTuple):
    """Seconds of a call: a sum of what each of its parts takes, at head size 64.

    Attributes:
        call: for being called.
        query: for a query of a head.
        pair: for an executed pair of a head.
        block: for a live block of a head.
        error: median of the relative error of the cases that it was fitted to.
        worst: the greatest of them.
    """

    call: float
    query: float
    pair: float
    block: float
    error: float
    worst: float

    def seconds(self, queries: float, pairs: float, blocks: float) -> float:
        """Of one call.

        Args:
            queries: of all heads and examples.
            pairs: that are executed, of all heads and examples.
            blocks: live ones, of all heads and examples.
        """
        work = (1, queries, pairs, blocks)
        return sum(n * seconds for n, seconds in zip(work, self[:4], strict=True))


class Measured(NamedTuple):
    """What the file says.

    Attributes:
        where: machine and date.
        fits: by implementation, and by "forward" and "training" (forward and backward).
        tile_rates: of pure XLA: (least area of a tile, GFLOP/s), the greatest first.
    """

    where: str
    fits: dict[str, dict[str, Fit]]
    tile_rates: tuple[tuple[int, float], ...]


@functools.cache
def read(path: Path) -> Measured:
    """A file as ``benchmarks.studies crossover`` writes it.

    Raises:
        ValueError: if it is not one.
    """
    try:
        content = json.loads(path.read_text())
        fits = {
            name: {direction: Fit(**fit) for direction, fit in fits.items()}
            for name, fits in content["fits"].items()
        }
        rates = tuple((int(area), float(r)) for area, r in content["tile_rates"])
        if not rates or rates[-1][0] != 0 or list(rates) != sorted(rates, reverse=True):
            raise ValueError(f"tile_rates: expected areas down to 0, got {rates}")
        return Measured(content["where"], fits, rates)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no measurements as 'python -m benchmarks.studies crossover' "
            f"writes them: {error!r}"
        ) from error


def measured() -> Measured:
    """The file that ``ATTNLAB_MEASURED`` names, or the one of the library."""
    given = os.environ.get(VARIABLE)
    return read(Path(given) if given else _FILE)
