"""Vocabularies of subwords, learnt by SentencePiece."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from attnlab._src.files import write_atomically
from benchmarks.studies.machinery.data.batches import END, PADDING, START, UNKNOWN
from benchmarks.studies.machinery.errors import StudyError

#: SentencePiece's mark for the beginning of a word.
WORD = "\N{LOWER ONE EIGHTH BLOCK}"


class Vocabulary:
    """Converts text to subwords and back.

    Attributes:
        size: V, special tokens included.
    """

    def __init__(self, model: bytes):
        """A learnt vocabulary.

        Args:
            model: the serialized SentencePiece model.
        """
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._pieces.get_piece_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""
        return self._pieces.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens up to the first END, without special tokens."""
        return self._pieces.decode(_sentence(tokens))

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Subwords as text, up to the first END."""
        return [self._pieces.id_to_piece(t) for t in _sentence(tokens)]

    def words(self, tokens: Iterable[int]) -> list[int]:
        """For each token the index of its word in ``text.split()``, -1 if special.

        Args:
            tokens: tokens of one sentence, with or without special ones.
        """
        found, word = [], -1
        for token in tokens:
            if token in {PADDING, START, END}:
                found.append(-1)
                continue
            # Before a word that starts with an unknown character, SentencePiece puts a
            # token that is only the mark.
            word += self._pieces.id_to_piece(int(token)).startswith(WORD)
            found.append(max(word, 0))
        return found


def _sentence(tokens: Iterable[int]) -> list[int]:
    kept = []
    for token in map(int, tokens):
        if token == END:
            break
        if token not in {PADDING, START}:
            kept.append(token)
    return kept


def learn(
    texts: Sequence[str],
    *,
    pieces: int = 4000,
    kind: Literal["bpe", "unigram"] = "bpe",
    cache: Path,
) -> Vocabulary:
    """Learns a vocabulary, or reads it if it was learnt from the same text before.

    Args:
        texts: sentences, of both languages for a joint vocabulary.
        pieces: V; the result has fewer if the text does not suffice.
        kind: kind of SentencePiece model.
        cache: folder for the result, in a file named by a hash of text and settings.

    Raises:
        StudyError: if there are too few pieces for the characters of the text.

    References:
        Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units",
        2016 (BPE); Kudo, "Subword Regularization", 2018 (unigram).
    """
    settings = {
        "vocab_size": pieces,
        "model_type": kind,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "pad_id": PADDING,
        "unk_id": UNKNOWN,
        "bos_id": START,
        "eos_id": END,
        # One thread, so that sums have a fixed order.
        "num_threads": 1,
        "shuffle_input_sentence": False,
        "max_sentence_length": 1 << 20,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(sentencepiece.__version__.encode())
    for text in texts:
        digest.update(text.encode() + b"\n")
    path = cache / f"vocabulary-{digest.hexdigest()[:16]}.model"
    if path.is_file():
        return Vocabulary(path.read_bytes())
    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=made,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise StudyError(
            f"a vocabulary of {pieces:,} pieces cannot be learnt from {len(texts):,} "
            f"sentences ({str(error).strip().splitlines()[-1]})"
        ) from None
    write_atomically(path, made.getvalue())
    return Vocabulary(made.getvalue())
