"""The file of measured times, which ``explain`` and block sizes use."""

import json

import jax
import jax.numpy as jnp
import pytest

from attnlab import explain, masks, modifiers, scores
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.measured import VARIABLE, Fit, measured, read
from attnlab._src.ops.explain import canonical
from attnlab._src.ops.explain import crossover as quote

RATES = [[2**19, 95.0], [2**18, 84.0], [0, 50.0]]
#: Times in which a pair takes a nanosecond, three in training, and all else none.
PAIRS = {
    name: {**dict.fromkeys(Fit._fields, 0.0), "pair": seconds}
    for name, seconds in (("forward", 1e-9), ("training", 3e-9))
}
X = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.float32)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """``given(fits=..., tile_rates=...)`` writes the file of measurements."""
    path = tmp_path / "measured.json"
    monkeypatch.setenv(VARIABLE, str(path))

    def write(fits=None, tile_rates=RATES):
        content = {"where": "here", "fits": fits or {}, "tile_rates": tile_rates}
        path.write_text(json.dumps(content))

    read.cache_clear()
    yield write
    read.cache_clear()


def quoted(mask, name="tiled", x=X, **options):
    args, _, inputs = canonical(x, x, x, {"mask": mask, **options})
    return quote(args.mask, inputs, IMPLEMENTATIONS[name])


def test_the_quote_follows_from_the_plan(given):
    given({"tiled": PAIRS})
    mask = masks.sliding_window(63, 63)
    plan = mask.plan(1024, block_size=(256, 128))
    tiled = IMPLEMENTATIONS["tiled"]
    *_, inputs = canonical(X, X, X, {"mask": mask})
    assert tiled.block_sizes(inputs) == (256, 128)
    share = (
        tiled.blocks_executed(plan).sum()
        / tiled.blocks_executed(masks.full().plan(1024, block_size=(256, 128))).sum()
    )
    text = quoted(mask)
    assert f"about {share:.0%} forward, {share:.0%} training" in text
    assert text.endswith("(fitted: here)")


def test_from_which_length_on(given):
    calls = {**PAIRS["forward"], "call": 1.0}
    given({"native": {"forward": PAIRS["forward"], "training": PAIRS["training"]}})
    # With blocks of 128, a causal plan leaves out some blocks from 256 on.
    assert "faster from T = 256 on" in quoted(masks.causal(), "native")
    given({"native": {"forward": calls, "training": calls}})
    read.cache_clear()
    text = quoted(masks.causal(), "native")
    assert "about 100% forward, 100% training" in text
    assert "faster" not in text


@pytest.mark.parametrize(
    ("mask", "x", "options"),
    [
        (masks.full(), X, {}),
        (masks.causal(), jax.ShapeDtypeStruct(X.shape, jnp.bfloat16), {}),
        (masks.causal(), X, {"modifiers": [modifiers.soft_cap(5.0)]}),
        (
            masks.causal(),
            X,
            {"score": scores.additive.init(jax.random.key(0), 64, hidden_size=8)},
        ),
        (masks.causal(), X, {"query_positions": jnp.arange(1024)}),
    ],
)
def test_what_nobody_can_tell(given, mask, x, options):
    given({"tiled": PAIRS})
    assert quoted(mask, x=x, **options) is None


def test_random_blocks_are_known_at_their_length(given):
    given({"tiled": PAIRS})
    text = quoted(masks.random_blocks(0, 2, 64, 16))
    assert "of full attention's time: about" in text
    assert "faster from" not in text
    seen = []

    def traced(query, mask):
        seen.append(quoted(mask))
        return query

    jax.eval_shape(traced, X, masks.random_blocks(0, 2, 64, 16))
    assert seen == [None]


def test_the_last_run_of_lengths_counts(given):
    given({"native": PAIRS})
    # The mask is a window up to 128, almost full at 1,024, and sparser again beyond.
    mask = masks.sliding_window(8, 8) | masks.anchor(range(128, 1024))
    x = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)
    assert "faster from T = 2,048 on" in quoted(mask, "native", x=x)
    assert "faster" not in quoted(mask, "native", x=X)


def test_what_nobody_measured(given):
    given({"tiled": PAIRS})
    assert quoted(masks.causal(), "native") is None
    text = str(explain(X, X, X, mask=masks.causal(), implementation="tiled"))
    assert "of full attention's time: about" in text


def test_tiles_follow_the_rates(given):
    x = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)
    *_, inputs = canonical(x, x, x, {"mask": masks.sliding_window(100, 100)})
    tiled = IMPLEMENTATIONS["tiled"]
    given(tile_rates=[[0, 1.0]])
    # All tiles are equally fast: the smallest one computes the fewest pairs.
    assert tiled.block_sizes(inputs) == (256, 128)
    given(tile_rates=[[2**19, 1e6], [0, 1.0]])
    read.cache_clear()
    assert tiled.block_sizes(inputs) == (1024, 512)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"where": "", "fits": {"a": {"b": {}}}}',
        '{"where": "", "fits": {}, "tile_rates": []}',
        '{"where": "", "fits": {}, "tile_rates": [[9, 1.0]]}',
        '{"where": "", "fits": {}, "tile_rates": [[0, 1.0], [9, 2.0]]}',
    ],
)
def test_a_file_that_holds_none(content, tmp_path, monkeypatch):
    path = tmp_path / "measured.json"
    path.write_text(content)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ValueError, match="holds no measurements as"):
        measured()


def test_what_comes_with_the_library():
    found = measured()
    assert set(found.fits["native"]) == {"forward", "training"}
    areas = [area for area, _ in found.tile_rates]
    assert areas == sorted(areas, reverse=True)
    assert areas[-1] == 0
