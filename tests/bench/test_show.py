"""The command ``attnlab show``."""

import json

import numpy as np
import pytest

from attnlab import masks
from attnlab._src.bench.cli import main
from attnlab._src.bench.show import live_blocks
from attnlab._src.masks.graph import reach, visible_share


def test_show(tmp_path, capsys):
    texts = ["sliding_window(4, 4) | anchor(1)", "causal() & sliding_window(4, 0)"]
    options = ["--length", "100", "--block-size", "16", "--out", str(tmp_path)]
    assert main(["show", *texts, *options]) == 0
    shown = capsys.readouterr().out
    assert "layers to full reach" in shown
    assert "show.json" in shown
    content = json.loads((tmp_path / "show.json").read_text())
    first, second = content["masks"]
    assert [first["mask"], second["mask"]] == texts
    assert (first["layers"], first["unreachable"]) == (2, 0)
    expected = reach(masks.sliding_window(4, 0), 100)
    assert second["layers"] == expected.layers == 25
    assert second["mean_path"] == expected.mean_path
    assert second["density"] == pytest.approx(masks.sliding_window(4, 0).density(100))
    for kind in ("png", "svg", "html"):
        assert (tmp_path / f"show.{kind}").stat().st_size > 1000
    assert 'is connected","25"' in (tmp_path / "show.html").read_text()


def test_long_masks_have_a_page_only(tmp_path, capsys):
    mask = "sliding_window(9, 0) | prefix(3)"
    assert main(["show", mask, "--length", "262144", "--out", str(tmp_path)]) == 0
    assert "is computed up to --length 4,096" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "show.json").read_text())["masks"]
    assert "layers" not in row
    assert row["density"] == pytest.approx(13 / 262144, rel=1e-3)
    assert {p.name for p in tmp_path.iterdir()} == {"show.html", "show.json"}


def test_live_blocks():
    dense = np.asarray(masks.sliding_window(5, 5).to_dense(64))
    blocks = dense.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
    live, full, total = live_blocks(masks.sliding_window(5, 5), 64, 8)
    assert (live, full, total) == (blocks.any(1).sum(), blocks.all(1).sum(), 64)
    heads = masks.per_head([masks.causal(), masks.full()])
    assert live_blocks(heads, 16, 8) == (3 + 4, 1 + 4, 8)


def test_heads_are_drawn_together():
    heads = masks.per_head([masks.causal(), masks.full()])
    shares = visible_share(heads, 4)
    np.testing.assert_array_equal(shares, np.where(np.tri(4), 1, 0.5))


def test_a_mask_that_sees_nothing(tmp_path):
    assert main(["show", "~full()", "--length", "8", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "show.json").read_text())["masks"]
    assert row["mean_path"] is None
    assert row["layers"] == 0


@pytest.mark.parametrize(
    ("mask", "more", "message"),
    [
        ("random_blocks(0, 1, 8, 2)", [], "built for 2 blocks"),
    ],
)
def test_what_does_not_fit(mask, more, message, tmp_path, capsys):
    assert main(["show", mask, "--out", str(tmp_path), *more]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_no_mask(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["show", "nonsense(3)", "--out", str(tmp_path)])
    assert "expected a call of anchor" in capsys.readouterr().err
