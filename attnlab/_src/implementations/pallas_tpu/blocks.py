"""Block sizes and their costs, from a table by TPU generation, head size and pass."""

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

#: Environment variable with the path of a table to use instead, from ``attnlab tune``.
VARIABLE = "ATTNLAB_TPU_BLOCKS"
_TABLE = Path(__file__).with_name("blocks.json")


class Blocks(NamedTuple):
    """Block sizes of a kernel.

    Attributes:
        q: number of queries in a block.
        k: number of keys in a block.
        chunk: number of keys that are computed at once; divides ``k``.
    """

    q: int
    k: int
    chunk: int


class Entry(NamedTuple):
    """Block sizes, and what they cost; only ratios of costs matter.

    Attributes:
        blocks: the sizes.
        outer: cost of an outer block (of queries in the forward pass, of keys in the
            backward pass) besides its live blocks.
        full: cost of a block without mask.
        partial: cost of a block with mask.
    """

    blocks: Blocks
    outer: float = 0.0
    full: float = 1.0
    partial: float = 1.0


#: Block sizes for an unknown TPU; they fit the smallest vector memory.
CAUTIOUS = Blocks(512, 512, 256)


class Device(NamedTuple):
    """The TPU to compile for.

    Attributes:
        kind: JAX's name of the generation; None: unknown.
        memory: bytes of vector memory of a core.
    """

    kind: str | None
    memory: int


def device() -> Device:
    """The default device, or the one of ``jax.sharding.use_abstract_mesh``."""
    try:
        found = pltpu.get_tpu_info()
    except ValueError:
        return Device(None, 2**24)
    return Device(str(found.chip_version.value), found.vmem_capacity_bytes)


def limit() -> int:
    """Bytes of vector memory that a kernel may use: half, as XLA also stores arrays."""
    return device().memory // 2


@functools.cache
def read(path: Path) -> dict[str, dict[int, dict[str, tuple[Entry, ...]]]]:
    """Reads a table: entries by generation, head size, and pass.

    Raises:
        ValueError: if the file is not a valid table.
    """
    try:
        content = json.loads(path.read_text())
        return {
            kind: {
                _whole(size): {of: _entries(size, of, x) for of, x in passes.items()}
                for size, passes in sizes.items()
            }
            for kind, sizes in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of blocks as 'attnlab tune' writes it: {error}"
        ) from error


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"head size: expected a whole number, got {text!r}")
    return int(text)


def _entries(head_size: str, of: str, found: object) -> tuple[Entry, ...]:
    if of not in ("forward", "backward"):
        raise ValueError(
            f"head size {head_size}: expected forward or backward, got {of!r}"
        )
    if not isinstance(found, list) or not found:
        raise ValueError(f"head size {head_size}, {of}: expected a list of entries")
    return tuple(_entry(f"head size {head_size}, {of}", x) for x in found)


def _entry(where: str, found: object) -> Entry:
    if isinstance(found, list) and len(found) == 6:
        (q, k, chunk), costs = found[:3], found[3:]
        whole = all(type(n) is int and n > 0 for n in found[:3])
        known = all(type(n) in (int, float) and 0 <= n < math.inf for n in costs)
        if whole and known and not (q % 128 or chunk % 128 or k % chunk):
            return Entry(Blocks(q, k, chunk), *costs)
    raise ValueError(
        f"{where}: expected entries [queries, keys, keys at once, cost of an outer "
        "block, of a full block, of a partial block], queries and keys at once "
        f"multiples of 128, keys a multiple of keys at once; got {json.dumps(found)}"
    )


def entries(head_size: int, of: str) -> tuple[Entry, ...]:
    """The block sizes to choose from.

    Args:
        head_size: size of a query head or of a value head, whichever is greater.
        of: "forward" or "backward".
    """
    given = os.environ.get(VARIABLE)
    sizes = read(Path(given) if given else _TABLE).get(device().kind or "", {})
    at_least = [size for size in sizes if size >= head_size] or [*sizes][-1:]
    found = sizes[min(at_least)].get(of) if at_least else None
    return found or (Entry(CAUTIOUS),)
