"""Many rows at once: every chunk once, few steps, bounded memory."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks
from attnlab._src.implementations import batched
from attnlab._src.implementations.batched import Lanes
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.ops.prepare import prepare
from attnlab._src.ops.validate import check

B, N, H = 2, 3, 8
MASKS = {
    "full": lambda t: masks.full(),
    "causal": lambda t: masks.causal(),
    "window": lambda t: masks.sliding_window(5, 0),
    "longformer": lambda t: masks.longformer(window=2, anchors=[1, 7, 8]),
    "nothing": lambda t: masks.full() & masks.lengths(key=np.zeros(B, np.int32)),
    "documents": lambda t: masks.documents(np.sort(np.arange(B * t).reshape(B, t) % 3)),
}


def inputs_of(t, mask):
    x = jnp.zeros((B, t, N, H))
    return prepare(*check(x, x, x, mask=mask))


def lanes_of(t, mask, blocks=(8, 4)):
    inputs = inputs_of(t, mask)
    tiles = Tiles.of(inputs, blocks)
    return tiles, Lanes.of(tiles)


@pytest.mark.parametrize("most", [1, 11, 1000])
@pytest.mark.parametrize("name", MASKS)
def test_every_chunk_is_computed_once(name, most, monkeypatch):
    monkeypatch.setattr(batched, "LONGEST_CHUNK", 8)
    monkeypatch.setattr(batched, "CHUNK", 8)
    monkeypatch.setattr(batched, "STEP_FLOATS", most * 8 * 4)
    length, chunk = 23, []

    @jax.jit
    def found():
        tiles, lanes = lanes_of(length, MASKS[name](length))
        assert lanes.count <= most
        chunk.append((lanes.chunk, lanes.count))
        total = jnp.broadcast_to(tiles.walk.total, (B, N, tiles.nq)).reshape(-1)
        steps = jnp.arange(total.size * tiles.nk, dtype=jnp.int32)
        return total, lanes.steps, *jax.vmap(lanes.at)(steps)

    total, steps, rows, ranks = map(np.asarray, found())
    ((chunk, count),) = chunk
    seen = []
    for row, rank in zip(rows[:steps].tolist(), ranks[:steps].tolist(), strict=True):
        assert len({*row}) == count  # idle lanes, too
        # A rank that no block has means no work.
        seen += [x for x in zip(row, rank, strict=True) if x[1] < length]
    wanted = [(r, n) for r, live in enumerate(total) for n in range(0, live, chunk)]
    assert sorted(seen) == wanted
    # As few steps as the longest row and the number of lanes allow.
    longest = -(-total.max() // chunk)
    assert steps == max(longest, -(-len(wanted) // count))


@pytest.mark.parametrize("backward", [False, True])
def test_the_number_of_rows_adds_no_step(backward, tile, monkeypatch):
    """Of a window: the program for twice the length has the same loops."""
    tile(8, 4, 8)
    monkeypatch.setattr(batched, "STEP_FLOATS", 2**20)

    mask = masks.sliding_window(30, 0)

    def operations(length):
        def run(x):
            return attention(x, x, x, mask=mask, implementation="batched").sum()

        shape = jax.ShapeDtypeStruct((B, length, N, H), jnp.float32)
        traced = jax.jit(jax.grad(run) if backward else run).trace(shape)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        # The steps are the only loops.
        assert text.count("stablehlo.while") == 1 + backward
        # The search for the row of a lane has a few more gathers in longer tables.
        heavy = r"stablehlo\.(dot_general|exponential|scatter|reduce)\b"
        return collections.Counter(re.findall(heavy, text))

    short, long = 96, 192
    assert operations(short) == operations(long)
    for length in (short, long):  # 9 blocks of keys, 2 in a chunk
        assert lanes_of(length, mask)[1].steps == 5


def test_copies_of_keys_are_bounded(monkeypatch):
    """Of many rows of a single query, as in decoding."""
    monkeypatch.setattr(batched, "STEP_FLOATS", 2**11)
    x = jnp.zeros((8, 64, N, H))
    inputs = prepare(*check(x[:, :1], x, x))
    lanes = Lanes.of(Tiles.of(inputs, (1, 4)))
    assert lanes.count > 1
    assert lanes.count * lanes.chunk * 4 * H <= 2**11


def test_memory_is_bounded():
    """A step holds its tiles; the rest is proportional to the length."""

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)

        def run(x):
            options = dict(mask=masks.causal(), implementation="batched")
            return attention(x, x, x, **options)

        found = jax.jit(run).lower(shape).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    # All pairs would be 17 GB; one step's tiles are 128 MiB in each array.
    length = 65_536
    linear = 8 * length * 64 * 4
    assert temporaries(length) < 6 * 4 * batched.STEP_FLOATS + linear
