"""What a notebook shows of masks, plans and weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention_with_stats, masks
from attnlab._src.picture import picture_of


def drawn_by(picture):
    """The shades of a picture's cells, 0 to 1, read back from its SVG."""
    columns, rows = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', picture)[0])
    shades = np.zeros((rows, columns))
    for path, opacity in re.findall(r'<path d="([^"]*)" opacity="([\d.]+)"', picture):
        for start, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1", path):
            part = shades[int(row), int(start) : int(start) + int(length)]
            assert not part.any()
            part[:] = float(opacity) / 0.75
    return shades


def test_a_notebook_draws_a_mask():
    drawn = (masks.causal() & ~masks.anchor(2))._repr_html_()
    assert drawn is not None
    assert "<svg" in drawn
    assert "<figcaption>(causal() &amp; ~" in drawn
    seen = masks.causal() & ~masks.anchor(2)
    np.testing.assert_array_equal(drawn_by(drawn), seen.to_dense(48))
    # One made for another length is shown as text.
    assert masks.documents(np.arange(5))._repr_html_() is None
    assert masks.per_head([masks.causal()] * 2)._repr_html_() is not None


def test_a_notebook_draws_a_plan():
    plan = masks.causal().plan(70, 100, block_size=(8, 16))
    picture = str(plan._repr_html_())
    assert "70 queries (down), 100 keys, in blocks of 8 x 16;" in picture
    assert "16 full and 9 partial of 63" in picture
    dense = np.pad(np.tril(np.ones((70, 100))), ((0, 2), (0, 12)), mode="edge")
    shades = drawn_by(picture)
    for row, column in np.ndindex(9, 7):
        block = dense[8 * row : 8 * row + 8, 16 * column : 16 * column + 16]
        wanted = 1 if block.all() else 0.5 if block.any() else 0
        assert abs(shades[row, column] - wanted) < 0.02


@pytest.mark.parametrize("top_k", ["all", 3])
def test_a_notebook_draws_weights(top_k):
    x = jax.random.normal(jax.random.key(0), (2, 6, 2, 8))
    result = attention_with_stats(x, x, x, mask=masks.causal(), top_k=top_k)
    picture = str(result._repr_html_())
    assert "weights of head 0 of example 0" in picture
    every = attention_with_stats(x, x, x, mask=masks.causal(), top_k="all").weights
    wanted = np.asarray(every)[0, 0]
    if top_k == 3:
        least = np.sort(wanted)[:, -3][:, None]
        wanted = np.where(wanted >= least, wanted, 0)
    shades = drawn_by(picture)
    assert np.abs(shades - wanted / wanted.max())[:, :6].max() <= 1 / 8 + 0.01
    assert ((shades > 0) == (wanted > 0)).all()
    assert attention_with_stats(x, x, x)._repr_html_() is None


def test_traced_data_are_shown_as_text():
    def traced(x):
        result = attention_with_stats(x, x, x, top_k="all")
        assert result._repr_html_() is None
        return result.output

    jax.eval_shape(traced, jnp.ones((1, 4, 1, 8)))


def test_treescope_shows_the_same(recwarn):
    treescope = pytest.importorskip("treescope")
    shown = treescope.render_to_html(masks.causal(), compressed=False)
    assert "48 queries (down), 48 keys" in shown


def test_large_pictures_are_small_and_text_is_escaped():
    """Cells are joined beyond 96; one cell among many empty ones is still seen."""
    shades = np.zeros((1000, 500))
    shades[777, 333] = 1
    picture = picture_of("<b>", shades)
    assert "<b>" not in picture
    found = drawn_by(picture)
    assert found.shape == (91, 84)
    assert found[777 // 11, 333 // 6] == 1
    assert found.sum() == 1
    assert len(picture_of("", np.ones((4096, 4096)))) < 4_000
