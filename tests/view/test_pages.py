"""Pages in a browser: what they draw is what a mask shows."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import extend, masks, show
from attnlab.extend import pytree
from tests.grid import MASKS, Setting

pytestmark = [pytest.mark.slow]

LONG = 2**20
HIDDEN, BOTH, VISIBLE = range(3)


def odd(t, s):
    return (t + s) % 3 == 1


def mixed(t, s):
    """Integers of 32 bits that overflow, signed and unsigned."""
    both = (t.astype(jnp.uint32) * jnp.uint32(2654435761)) ^ s.astype(jnp.uint32)
    high = (both >> jnp.uint32(28)) % jnp.uint32(3) != 1
    return (
        (both % jnp.uint32(3) == 0)
        | high & (both < jnp.uint32(2**31))
        | ((-t) // 7 == -s % 5)
    )


def shifted(t, s):
    return ((t << (s % 40 - 2)) ^ (-s >> (t % 40))) % 3 == 1


def of_floats(t, s, limits):
    near = jnp.abs(t.astype(jnp.float32) - s.astype(jnp.float32)) + 0.25
    return (near <= limits) ^ (jnp.floor(limits).astype(jnp.int32) > t)


def of_flags(t, s, flags):
    return (flags == (s <= t)) & (jnp.maximum(flags, s > 3) != (t > 30))


def taken(t, s):
    """Beyond its ends ``take`` yields True; the last ``take`` ends at them."""
    few = jnp.array([True, False, True, False, False])
    return jnp.take(few, t - s) ^ jnp.take(few, t - 2 * s, mode="clip")


@pytree
class SomeHeads(extend.Mask):
    """It reads the head, and has no translation."""

    def visible(self, tile, operands):
        shift = jnp.sin(tile.query_positions.astype(jnp.float32)) * 4
        keys = tile.key_positions.astype(jnp.float32)
        return keys * 0.1 + shift < tile.head.astype(jnp.float32)


def wavy(t, s):
    return (jnp.sin(t.astype(jnp.float32)) > 0) & (s >= 0)


def states(browser, which, head, example, t, s) -> np.ndarray:
    """What the page says of each pair of a mask."""
    found = browser.execute_async_script(
        """
        const [which, head, example, queries, keys, done] = arguments;
        attnlab.select(which).then(() => {
          attnlab.choose(head, example);
          const found = [];
          for (let t = 0; t < queries; t++)
            for (let s = 0; s < keys; s++) found.push(attnlab.stateAt(t, s));
          done(found);
        });
        """,
        *(which, head, example, t, s),
    )
    return np.array(found).reshape(t, s)


def test_every_mask_is_decided_as_attention_does(opened):
    t, s = 40, 52
    rng = np.random.default_rng(0)
    setting = Setting(B=2, T=t, S=s, N=4, K=2, Q=8, H=8, D=8, rng=rng)
    built: dict[str, Any] = {name: make(setting) for name, make in MASKS.items()}
    del built["none"]
    built["dense"] = masks.dense(built["dense"])
    limits = rng.choice([0.5, 7.25, np.inf, -np.inf, np.nan], (t, 1))
    flags = rng.random((2, 1, 1, s)) < 0.5
    rules = dict.fromkeys((odd, mixed, shifted, wavy, taken), ())
    for rule, given in (rules | {of_floats: (limits,), of_flags: (flags,)}).items():
        mask = masks.predicate(rule, *given)
        built[rule.__name__] = mask | masks.anchor(3, see_all=False)
    heads = rng.random((1, 4, t, s)) < 0.5
    built["heads"] = SomeHeads() & masks.dense(heads)
    page = show([*built.values()], t, s, block_size=8)
    seen = opened(page)
    for which, (name, mask) in enumerate(built.items()):
        dense = np.asarray(mask.to_dense(t, s))
        dense = dense.reshape(*(dense.shape[:-2] or (1, 1)), t, s)
        for example, head in np.ndindex(*dense.shape[:2]):
            found = states(seen, which, head, example, t, s)
            wanted = np.where(dense[example, head], VISIBLE, HIDDEN)
            np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_what_cannot_be_translated_is_known_by_blocks(opened, monkeypatch):
    from attnlab._src.view import masks as contents

    monkeypatch.setattr(contents, "_MOST_PAIRS", 100)
    mask = masks.causal() & masks.predicate(wavy)
    found = states(opened(show(mask, 40, block_size=8)), 0, 0, 0, 40, 40)
    # Where the other part hides a pair, the answer is known.
    np.testing.assert_array_equal(found, np.where(np.tri(40), BOTH, HIDDEN))


def kinds_of(plan) -> np.ndarray:
    """What a plan says of each block."""
    count = -(-plan.key_length // plan.block_k)
    found = np.full((plan.rows.full.lo.shape[2], count), HIDDEN, np.uint8)
    for kind, (lo, hi) in zip((VISIBLE, BOTH), plan.rows, strict=True):
        for row, run in np.ndindex(lo.shape[2:]):
            found[row, lo[0, 0, row, run] : hi[0, 0, row, run]] = kind
    return found


def pixels(browser):
    """The colours of the canvas as 0, 1 and 2, and -1 for the ground."""
    return np.array(
        browser.execute_script(
            """
            attnlab.draw();
            const canvas = document.querySelector("canvas");
            const style = getComputedStyle(document.documentElement);
            const known = ["--empty", "--partial", "--full"].map((name) =>
              parseInt(style.getPropertyValue(name).trim().slice(1), 16));
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            const found = [];
            for (let y = 0; y < height; y++) {
              found.push([]);
              for (let x = 0; x < width; x++) {
                const i = 4 * (y * width + x);
                const colour = data[i] << 16 | data[i + 1] << 8 | data[i + 2];
                found[y].push(known.indexOf(colour));
              }
            }
            return found;
            """
        )
    )


def places(browser, size):
    """The query of each row of pixels and the key of each column, and the scale."""
    view = browser.execute_script("return attnlab.view")
    middle = (np.arange(size) + 0.5) / view["scale"]
    return (np.floor(view[side] + middle).astype(int) for side in "ts"), view["scale"]


def test_pixels_of_pairs(opened):
    mask = ~masks.dilated_window(9, 5, 2) & masks.causal() | masks.anchor(4)
    dense = np.where(np.asarray(mask.to_dense(150)), VISIBLE, HIDDEN)
    seen = opened(show(mask, 150))
    for zoom in (1, 3, 2.7):
        seen.execute_script(f"attnlab.zoom({zoom}, 400, 300)")
        found = pixels(seen)
        (t, s), scale = places(seen, len(found))
        assert scale >= 1
        inside = found[np.ix_(t < 150, s < 150)]
        wanted = dense[np.ix_(t[t < 150], s[s < 150])]
        np.testing.assert_array_equal(inside, wanted)


def test_pixels_of_a_million_positions(opened):
    """From afar blocks, near by pairs; the page is small."""
    mask = masks.causal() & (
        masks.sliding_window(100_000, 0)
        | masks.prefix(40_000)
        | masks.documents(np.arange(LONG) // 99_999)
    )
    page = show(mask, LONG)
    assert len(page.html) < 200_000
    seen = opened(page)
    found = pixels(seen)
    size, width = len(found), LONG / len(found)
    block = 128
    plan = mask.plan(LONG, block_size=block)
    kinds = kinds_of(plan)
    alive, full = kinds != HIDDEN, kinds == VISIBLE
    edges = np.arange(size) * width / block
    first, last = edges.astype(int), np.ceil(edges + width / block).astype(int)
    for y in range(0, size, 13):
        rows = slice(first[y], last[y])
        some = [alive[rows, a:b].any() for a, b in zip(first, last, strict=True)]
        every = [full[rows, a:b].all() for a, b in zip(first, last, strict=True)]
        wanted = np.where(every, VISIBLE, np.where(some, BOTH, HIDDEN))
        np.testing.assert_array_equal(found[y], wanted)
    # A million positions further down, pair by pair.
    for corner in (LONG - 300, 399_996, 140_100):
        seen.execute_script(
            "Object.assign(attnlab.view, {scale: 8, t: arguments[0], s: arguments[1]});"
            "attnlab.clampView()",
            corner, corner - 40_000 if corner == 140_100 else corner - 20,
        )  # fmt: skip
        found = pixels(seen)
        (t, s), _ = places(seen, len(found))
        t, s = t[t < LONG][:, None], s[s < LONG][None]
        near = (t - s <= 100_000) | (s < 40_000) | (t // 99_999 == s // 99_999)
        wanted = np.where((s <= t) & near, VISIBLE, HIDDEN)
        np.testing.assert_array_equal(found[: len(t), : s.size], wanted)


def test_the_part_that_decides_is_named(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    mask = masks.causal() & (masks.sliding_window(8, 0) | ~masks.chunked(50))
    seen = opened(show(mask, 200))
    canvas = seen.find_element(By.ID, "view")
    said = lambda: seen.find_element(By.ID, "said").text

    def decides():
        chosen = seen.find_elements(By.CSS_SELECTOR, "#expression .decides")
        return {x.text for x in chosen}

    # The keyboard points at the middle: query 100, key 100.
    canvas.send_keys("0")
    assert said().startswith("Query 100, key 100: visible")
    assert decides() == {"causal()", "sliding_window(8, 0)"}
    canvas.send_keys("+", Keys.ARROW_RIGHT)
    # Each of these parts is enough to hide key 112.
    assert "hidden, decided by causal(), sliding_window(8, 0), chunked(50)." in said()
    assert decides() == {"causal()", "sliding_window(8, 0)", "chunked(50)"}
    for _ in range(2):
        canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert "visible, decided by causal(), chunked(50)." in said()
    numbers = seen.find_element(By.ID, "numbers").text
    assert "visible pairs" in numbers
    assert "keys and values read" in numbers
    assert "layers until all that can be is connected" in numbers
    assert len(seen.find_elements(By.CSS_SELECTOR, "#bands tr")) > 1


def test_themes_and_phones(opened):
    from selenium.webdriver.common.by import By

    seen = opened(show([masks.causal(), masks.longformer(window=4)], 64), 500, 900)
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = seen.execute_script(ground), pixels(seen)
    seen.find_element(By.ID, "theme").click()
    after = seen.execute_script(ground), pixels(seen)
    assert before[0] != after[0]
    np.testing.assert_array_equal(before[1], after[1])
    seen.find_element(By.ID, "theme").click()
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    assert seen.execute_script(wide) <= 0
    menu = seen.find_element(By.ID, "which")
    assert [x.text for x in menu.find_elements(By.TAG_NAME, "option")][0] == "causal()"


HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\U0001f600" + "x" * 10_000


def test_hostile_names_are_text(opened):
    def rule(t, s):
        return s <= t

    rule.__name__ = HOSTILE
    seen = opened(show(masks.predicate(rule), 16))
    assert seen.execute_script("return document.images.length") == 0
    text = seen.execute_script(
        "return document.getElementById('expression').textContent"
    )
    assert text == f"predicate({HOSTILE})"


def test_a_plan(opened):
    plan = masks.sliding_window(40, 0).plan(320, block_size=(64, 32))
    seen = opened(show(plan))
    found = states(seen, 0, 0, 0, 320, 320)[::64, ::32]
    np.testing.assert_array_equal(found, kinds_of(plan))
