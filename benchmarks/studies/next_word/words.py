"""Texts as streams of whole words, and kinds of words."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.batches import END, START, UNKNOWN
from benchmarks.studies.machinery.record import Json

#: Labels of PADDING, UNKNOWN, START and END.
SPECIAL = ("(padding)", "(unknown)", "§", "¶")
#: A word with inner apostrophes, a number, or one other character.
TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]|_")
#: Kinds of words; "mark" is an unknown word or the end of a paragraph.
KINDS = ("function", "content", "punctuation", "mark")
_LISTED = (
    # Articles and determiners.
    "a an the this that these those such some any no every each all both either "
    "neither another other much many more most few several own same "
    # Pronouns.
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves "
    "thou thee thy thine ye he him his himself she her hers herself it its itself they "
    "them their theirs themselves who whom whose which what one none nothing anything "
    "something everything nobody anyone everyone someone "
    # Prepositions.
    "of to in for on with by at from into upon under over between among through during "
    "against without within before after about above below across along around behind "
    "beside besides beyond near off out up down since till until toward towards like "
    "per via throughout concerning except "
    # Conjunctions and adverbs that join or negate.
    "and or but nor so yet if then than as because while when where whether though "
    "although unless however therefore how why that not there here "
    # Auxiliaries.
    "be am is are was were been being have has had having do does did done doing will "
    "would shall should can could may might must ought let "
    # Contractions of these.
    "it's that's there's he's she's what's who's i'm i've i'll i'd we're we've we'll "
    "we'd you're you've you'll they're they've they'll don't doesn't didn't can't "
    "couldn't won't wouldn't isn't aren't wasn't weren't haven't hasn't hadn't "
    "shouldn't let's cannot"
)
FUNCTION = frozenset(_LISTED.split())


def tokens_of(text: str) -> list[str]:
    """Words, numbers and punctuation marks of a text, in lower case."""
    return TOKEN.findall(text.casefold().replace("’", "'"))


def kind_of(word: str) -> int:
    """Index into :data:`KINDS`; a number is content."""
    if word in SPECIAL:
        return 3
    if word in FUNCTION:
        return 0
    return 1 if word[0].isalnum() else 2


class Words:
    """A vocabulary of the most frequent words.

    Attributes:
        labels: the word of each token; the first are :data:`SPECIAL`.
        size: V, special tokens included.
        kinds: ``[V]``: index into :data:`KINDS` of each token.
    """

    def __init__(self, read: Iterable[str], size: int):
        """Counts words.

        Args:
            read: the words to count.
            size: the greatest V.
        """
        counts = Counter(read)
        # Equally frequent words in alphabetical order: the result has one order only.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self.labels = [*SPECIAL, *ranked[: size - len(SPECIAL)]]
        self.size = len(self.labels)
        self.kinds = np.array([kind_of(word) for word in self.labels], np.int32)
        self._tokens = {word: token for token, word in enumerate(self.labels)}

    def __contains__(self, word: str) -> bool:
        return word in self._tokens

    def encode(self, words: Iterable[str]) -> list[int]:
        """Tokens of words."""
        return [self._tokens.get(word, UNKNOWN) for word in words]


#: A document: its paragraphs, each a list of words.
Document = list[list[str]]


class Text(NamedTuple):
    """Documents for training, development and test.

    A stream is START and the paragraphs of a document, each followed by END, for one
    document after another.

    Attributes:
        train: stream to train on, ``[*]`` int32.
        dev: stream for choices.
        test: stream for the test.
        documents: the documents of the test.
        words: vocabulary, of the training documents.
        counts: numbers of tokens, for the page.
        fingerprint: a hash of the streams and the vocabulary.
    """

    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray
    documents: list[Document]
    words: Words
    counts: Json
    fingerprint: str


def text_of(parts: dict[str, list[Document]], size: int) -> Text:
    """Makes streams of documents.

    Args:
        parts: documents of "train", "dev" and "test".
        size: the greatest size of the vocabulary.
    """
    read = (w for document in parts["train"] for part in document for w in part)
    words = Words(read, size)
    digest = hashlib.sha256("\n".join(words.labels).encode())
    streams = {}
    for name in ("train", "dev", "test"):
        tokens: list[int] = []
        for document in parts[name]:
            tokens.append(START)
            for part in document:
                tokens += [*words.encode(part), END]
        streams[name] = np.asarray(tokens, np.int32)
        digest.update(name.encode() + streams[name].tobytes())
    counts: Json = {
        "tokens": {name: len(stream) for name, stream in streams.items()},
        "documents": {name: len(parts[name]) for name in streams},
        "vocabulary": words.size,
        "unknown": float((streams["test"] == UNKNOWN).mean()),
    }
    fingerprint = digest.hexdigest()[:16]
    return Text(**streams, documents=parts["test"], words=words, counts=counts,
                fingerprint=fingerprint)  # fmt: skip


def addresses(context: Context, size: int, **options: int | None) -> Text:
    """The addresses; see ``read_documents`` for the options."""
    found = context.documents(**options)
    parts = {
        name: [[tokens_of(part) for part in document] for document in documents]
        for name, documents in found.parts().items()
    }
    return text_of(parts, size)


def verses(context: Context, size: int, limit: int | None) -> Text:
    """The English verses; a document is a chapter, a paragraph a verse."""
    found = context.split_pairs(limit=limit)
    parts: dict[str, list[Document]] = {}
    for name in ("train", "dev", "test"):
        chapters: dict[str, Document] = {}
        for pair in getattr(found, name):
            chapters.setdefault(pair.group, []).append(tokens_of(pair.target))
        parts[name] = list(chapters.values())
    return text_of(parts, size)


class Sentence(NamedTuple):
    """The beginning of a sentence, and what comes next.

    Attributes:
        text: name of the text that it is from; None: of none.
        words: its words.
        next: the word that comes next; None if the sentence is made up.
    """

    text: str | None
    words: Sequence[str]
    next: str | None


#: The fewest and the most words of a beginning.
SHORTEST, LONGEST = 4, 12


def drawn(name: str, text: Text, count: int) -> list[Sentence]:
    """Beginnings of random sentences of the test, each before a content word.

    Args:
        name: name of the text.
        text: the text.
        count: number of sentences.
    """
    random = np.random.default_rng(0)
    content = KINDS.index("content")
    found: list[Sentence] = []
    sentences = [s for d in text.documents for part in d for s in _sentences(part)]
    for i in random.permutation(len(sentences)):
        sentence = sentences[i]
        places = [
            at
            for at in range(SHORTEST, min(LONGEST + 1, len(sentence)))
            if sentence[at] in text.words and kind_of(sentence[at]) == content
        ]
        if places and len(found) < count:
            at = int(random.choice(places))
            found.append(Sentence(name, sentence[:at], sentence[at]))
    return found


def _sentences(words: Sequence[str]) -> list[Sequence[str]]:
    ends = [i + 1 for i, word in enumerate(words) if word in {".", "!", "?"}]
    borders = [0, *ends, len(words)]
    return [words[a:b] for a, b in zip(borders, borders[1:], strict=False) if a < b]
