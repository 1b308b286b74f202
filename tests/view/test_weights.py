"""Pages of attention weights: what they hold and draw is what attention computed."""

import base64
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import AttentionResult, attention_with_stats, masks, show_weights
from attnlab._src.view.weights import content_of_weights

WORDS = ["the", "students", "opened", "their"]


def computed(t=12, s=12, heads=3, seed=0, **options):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=(2, n, heads, 8)).astype(np.float32) for n in (t, s))
    return attention_with_stats(x, y, y, **options)


def held(browser, layer, head, query) -> dict[int, float]:
    """Weights of a query by key, as the page has them."""
    script = "return attnlab.weightsOf(...arguments)"
    found = browser.execute_script(script, layer, head, query)
    return {key: weight for key, weight in found}  # noqa: C416 - pairs are lists


@pytest.mark.slow
def test_weights_are_those_of_attention(opened):
    every = computed(top_k="all", mask=masks.causal())
    some = computed(top_k=5, seed=1)
    names = [f"word {i}" for i in range(12)]
    seen = opened(show_weights({"first": every, "second": some}, names, example=1))
    dense = np.asarray(every.weights)[1]
    weights, indices = (np.asarray(x)[1] for x in (some.weights, some.indices))
    for head, query in np.ndindex(3, 12):
        found = held(seen, 0, head, query)
        wanted = {int(s): dense[head, query, s] for s in range(query + 1)}
        assert found.keys() <= wanted.keys()
        for key, weight in wanted.items():
            assert abs(found.get(key, 0) - weight) < 1e-5
        found = held(seen, 1, head, query)
        for key, weight in zip(indices[head, query], weights[head, query], strict=True):
            assert abs(found.pop(int(key), 0) - weight) < 1e-5
        assert not found


def test_weights_without_a_result_are_shown_alike():
    """Also those of recurrent models, ``[B, T, S]``: one head."""
    result = computed(top_k="all")
    weights = np.asarray(result.weights)
    first = content_of_weights({"a": result}, None, None, 1)
    assert content_of_weights({"a": weights}, None, None, 1) == first
    one = content_of_weights({"a": weights[:, 0]}, None, None, 1)["layers"][0]
    assert (one["heads"], one["queries"], one["keys"]) == (1, 12, 12)
    assert "layers" in show_weights(weights).html


@pytest.mark.slow
def test_pixels_are_weights(opened):
    result = computed(20, 30, top_k="all")
    seen = opened(show_weights(result))
    seen.execute_script("attnlab.select(0, 2); attnlab.draw()")
    ends, image, view = seen.execute_script(
        """
        const { width } = attnlab.canvas, pen = attnlab.canvas.getContext("2d");
        return [["--empty", "--full"].map(colour),
                [...pen.getImageData(0, 0, width, width).data], attnlab.view];
        """
    )
    low, high = np.array(ends, float)
    size = int((len(image) // 4) ** 0.5)
    image = np.array(image).reshape(size, size, 4)
    weights = np.asarray(result.weights)[0, 2]
    centres = ((np.arange(30) + 0.5) * view["scale"]).astype(int)
    shades = np.rint(255 * np.sqrt(np.rint(weights * 65535) / 65535))[..., None] / 255
    wanted = np.floor(low + (high - low) * shades + 0.5)
    found = image[..., :3][np.ix_(centres[:20], centres)]
    # A shade that lies between two may go either way.
    assert np.abs(found - wanted).max() <= 1
    # Below the last query the picture is transparent.
    assert (image[centres[19] + int(view["scale"]) :, :, 3] == 0).all()


@pytest.mark.slow
def test_one_looks_through_layers_and_heads(opened):
    from selenium.webdriver.common.by import By

    result = computed(4, 4, top_k="all", mask=masks.causal())
    seen = opened(show_weights({"low": result, "high": result}, WORDS))
    buttons = seen.find_elements(By.CSS_SELECTOR, "#overview button")
    assert [x.get_attribute("title") for x in buttons][2:4] == [
        "low, head 2",
        "high, head 0",
    ]
    buttons[4].click()
    pressed = seen.find_elements(By.CSS_SELECTOR, "#overview [aria-pressed=true]")
    assert [x.get_attribute("title") for x in pressed] == ["high, head 1"]
    label = seen.find_element(By.ID, "view").get_attribute("aria-label")
    assert label == "Weights of high, head 1: 4 queries, 4 keys"
    seen.find_element(By.ID, "view").send_keys("0")
    said = seen.find_element(By.ID, "said").text
    assert said.startswith("Query 2 (opened), key 2 (opened): weight")
    rows = seen.find_elements(By.CSS_SELECTOR, "#greatest tr")
    shown = [float(x.text.split()[2]) for x in rows[1:]]
    weights = np.asarray(result.weights)[0, 1, 2, :3]
    np.testing.assert_allclose(shown, sorted(weights)[::-1], atol=1e-4)
    assert len(seen.find_elements(By.CSS_SELECTOR, "#arcs path")) == 3
    words = seen.find_elements(By.CSS_SELECTOR, "#arcs text")
    assert [x.text for x in words] == [*WORDS, "opened"]


@pytest.mark.slow
def test_hostile_tokens_are_text(opened):
    tokens = ["<img src=x onerror=alert(1)>", "</script>", "\u202eright", "\U0001f600"]
    tokens.append('"' * 10_000)
    result = computed(5, 5, top_k="all")
    seen = opened(show_weights({"<b>": result}, tokens))
    seen.execute_script("attnlab.zoom(1)")
    assert seen.execute_script("return document.images.length") == 0
    assert seen.execute_script("return content.tokens") == tokens
    assert "<b>" in seen.title


@pytest.mark.slow
def test_thousands_of_tokens(opened):
    """The page holds as many weights as fit, the greatest ones."""
    layer = computed(2048, 2048, 8, top_k=64, mask=masks.sliding_window(100, 0))
    page = show_weights({f"layer {i}": layer for i in range(4)})
    assert len(page.html) < 6_000_000
    seen = opened(page)
    weights = np.asarray(layer.weights)[0, 7, 2000]
    found = sorted(held(seen, 3, 7, 2000).values(), reverse=True)
    assert 10 < len(found) <= 16
    np.testing.assert_allclose(found, weights[: len(found)], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            dict(results=3),
            TypeError,
            "results: expected an Attention.* got int",
        ),
        (dict(results={}), TypeError, "results: expected an AttentionResult"),
        (dict(results={"a": 3}), TypeError, "for a, or its weights .* got int;"),
        (dict(results=np.ones(3)), TypeError, "got ndarray of shape .3,."),
        (dict(example=2), ValueError, "example: expected 0 to 1 for attention, got 2"),
        (dict(tokens=3), TypeError, "tokens: expected a list of strings"),
        (dict(tokens="text"), TypeError, "tokens: expected a list of strings"),
        (dict(tokens=WORDS[:2]), ValueError, "tokens: expected 4 strings, .* got 2"),
        (dict(key_tokens=WORDS[:3]), ValueError, "key_tokens: expected 4 .* got 3"),
    ],
)
def test_clear_errors(change: Any, error, said):
    given: Any = {"results": plain(), **change}
    with pytest.raises(error, match=said):
        show_weights(**given)


def plain(**change) -> AttentionResult:
    found = dict(output=None, lse=None, weights=np.full((2, 3, 4, 4), 0.25))
    return AttentionResult(**found | change)  # pyrefly: ignore[bad-argument-type]


def test_dropped_weights_may_be_greater_than_one():
    """They are stored by the greatest one; a key that is not seen has none."""
    weights = np.array([[[[1.5, 0.5]]]], np.float32)
    content = content_of_weights({"a": plain(weights=weights)}, None, None, 0)
    (layer,) = content["layers"]
    stored = np.frombuffer(
        zlib.decompress(base64.b64decode(layer["weights"]["bytes"])), np.uint16
    )
    np.testing.assert_allclose(stored * layer["unit"], [1.5, 0.5], rtol=1e-4)


def test_weights_must_be_there_and_known():
    with pytest.raises(ValueError, match="attention has no weights; attention_with_st"):
        show_weights(plain(weights=None))
    with pytest.raises(ValueError, match="weights that are not finite"):
        show_weights(plain(weights=np.full((2, 3, 4, 4), np.nan)))

    def traced(weights):
        with pytest.raises(ValueError, match="attention is traced"):
            show_weights(plain(weights=weights))
        return weights

    jax.eval_shape(traced, jax.ShapeDtypeStruct((1, 1, 2, 2), jnp.float32))


def test_a_page_of_weights():
    page = show_weights(plain(), WORDS)
    assert "Attention weights: attention" in page.html
    assert "students" in page.html
