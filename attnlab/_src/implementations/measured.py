"""Measured timings from a small file, for ``explain`` and the choice of block sizes.

``benchmarks.studies crossover`` writes the file. Only ratios of its numbers matter, so
it is also valid for similar machines.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

#: Environment variable with a path that replaces the library's own file.
VARIABLE = "ATTNLAB_MEASURED"
_FILE = Path(__file__).with_name("measured.json")


class Fit(NamedTuple):
    """A linear model of the seconds of a call, at head size 64.

    Attributes:
        call: constant time of a call.
        query: time per query and head.
        pair: time per executed pair and head.
        block: time per live block and head.
        error: median of the relative errors of the cases that it was fitted to.
        worst: greatest of these errors.
    """

    call: float
    query: float
    pair: float
    block: float
    error: float
    worst: float

    def seconds(self, queries: float, pairs: float, blocks: float) -> float:
        """Estimated seconds of one call.

        Args:
            queries: number of queries, over all heads and examples.
            pairs: number of executed pairs, over all heads and examples.
            blocks: number of live blocks, over all heads and examples.
        """
        work = (1, queries, pairs, blocks)
        return sum(n * seconds for n, seconds in zip(work, self[:4], strict=True))


class Measured(NamedTuple):
    """Content of the file.

    Attributes:
        where: machine and date.
        fits: fits by implementation, and by "forward" and "training" (forward and
            backward).
        tile_rates: rates of ``tiled``: (least area of a tile, GFLOP/s), by descending
            area.
    """

    where: str
    fits: dict[str, dict[str, Fit]]
    tile_rates: tuple[tuple[int, float], ...]


@functools.cache
def read(path: Path) -> Measured:
    """Reads a file that ``benchmarks.studies crossover`` wrote.

    Raises:
        ValueError: if it is not such a file.
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
    """Timings from the file that ``ATTNLAB_MEASURED`` names, or the library's own."""
    given = os.environ.get(VARIABLE)
    return read(Path(given) if given else _FILE)
