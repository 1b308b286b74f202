"""``show``: what it takes, and what it says of other things."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks, show
from attnlab._src.masks.planning import alone
from attnlab._src.view.javascript import function_of
from attnlab._src.view.masks import blocks_of
from attnlab._src.view.operations import NotTranslated


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (
            (3, 8),
            TypeError,
            "thing: expected a mask, .* or a Plan, got int",
        ),
        (([], 8), ValueError, "expected at least one mask"),
        ((masks.causal(),), TypeError, "query_length: expected a length"),
        ((masks.causal(), 0), ValueError, "query_length"),
        ((masks.causal().plan(8), 8), TypeError, "query_length: a plan has lengths"),
        ((masks.documents(np.arange(4)), 8), ValueError, "4"),
    ],
)
def test_clear_errors(given: Any, error, said):
    with pytest.raises(error, match=said):
        show(*given)


def test_traced_arrays_are_refused():
    def traced(ids):
        with pytest.raises(ValueError, match="expected known arrays, got traced ones"):
            show(masks.documents(ids), 4)
        return ids

    jax.eval_shape(traced, jax.ShapeDtypeStruct((4,), jnp.int32))


def test_what_must_be_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"need jinja2, .*attnlab\[bench\]"):
        show(masks.causal(), 8)


def test_a_notebook_gets_a_frame(tmp_path):
    page = show(masks.causal(), 8)
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert page.save(tmp_path / "new" / "mask.html").read_text() == page.html


def test_a_page_grows_with_the_blocks_and_not_with_the_pairs():
    mask = masks.causal() & masks.sliding_window(64, 0)
    short, long = (show(mask, n) for n in (2**13, 2**20))
    assert len(long.html) < 100_000
    assert len(long.html) < 4 * len(short.html)


def sine(t, s):
    return (jnp.sin(t.astype(jnp.float32)) > 0) & (s >= 0)


def test_functions_that_browsers_round_otherwise_are_not_translated():
    mask = masks.predicate(sine)
    with pytest.raises(NotTranslated, match="the operation sin"):
        function_of(mask, alone(mask, 8, 8)[0])
    # Few pairs are stored.
    assert "data[0][t * 8 + s] === 1" in show(mask, 8).html


def test_rows_of_blocks_are_runs():
    import base64
    import zlib

    mask = masks.per_head([masks.causal(), masks.sliding_window(9, 9)])
    plan = mask.plan(70, 50, block_size=8)
    packed = blocks_of(plan)
    assert packed["shape"] == [1, 2, 9, 7]
    counts, runs = (
        np.frombuffer(zlib.decompress(base64.b64decode(packed[n]["bytes"])), np.int32)
        for n in ("counts", "runs")
    )
    dense = np.asarray(mask.to_dense(70, 50))[0]
    at = 0
    for number, count in enumerate(counts):
        head, row = divmod(number, 9)
        found, end = np.zeros(7, int), 0
        for gap, size in runs[2 * at : 2 * (at + count)].reshape(-1, 2):
            start = end + gap // 2
            found[start : start + size] = 1 + gap % 2
            end = start + size
        at += count
        for block in range(7):
            part = dense[head, row * 8 : row * 8 + 8, block * 8 : block * 8 + 8]
            assert not part.any() or found[block]
            assert part.all() or found[block] < 2
    assert at == len(runs) // 2
