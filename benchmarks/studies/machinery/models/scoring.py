"""Quality of translations: BLEU and chrF with intervals, also by length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from benchmarks.studies.machinery.data.batches import END, Batch
from benchmarks.studies.machinery.record import Json

#: Classes by words of the source: up to 10, 11 to 20, ..., more than 40.
EDGES = (10, 20, 30, 40)


class Score(NamedTuple):
    """A score of a set of translations, with its interval.

    Attributes:
        value: from 0 to 100.
        mean: mean over bootstrap samples of the sentences.
        half_width: half the 95 % interval around ``mean``.
        signature: sacreBLEU's signature of the settings.
    """

    value: float
    mean: float
    half_width: float
    signature: str

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half_width:.1f}"


class _OneType:
    """Makes scores floats: sacreBLEU returns another type for empty statistics."""

    def _compute_score_from_stats(self, stats: list[int]) -> Any:
        above: Any = super()
        found = above._compute_score_from_stats(stats)
        found.score = float(found.score)
        return found


class _Bleu(_OneType, BLEU):
    pass


class _Chrf(_OneType, CHRF):
    pass


def score(
    translations: Sequence[str], references: Sequence[str], *, bootstrap: int = 1000
) -> dict[str, Score]:
    """BLEU and chrF of detokenised text.

    Args:
        translations: sentences.
        references: one for each.
        bootstrap: number of samples, at least 2; drawn with a fixed seed.

    References:
        Papineni et al., "BLEU", 2002; Popović, "chrF", 2015; Post, "A Call for Clarity
        in Reporting BLEU Scores", 2018; Koehn, "Statistical Significance Tests for
        Machine Translation Evaluation", 2004 (bootstrap).
    """
    if len(translations) != len(references) or not translations:
        raise ValueError(
            f"references: expected one for each translation, got {len(references)} for "
            f"{len(translations)}"
        )
    found = {}
    for name, metric in (("bleu", _Bleu()), ("chrf", _Chrf())):
        result: Any = metric.corpus_score(
            list(translations), [list(references)], n_bootstrap=bootstrap
        )
        # sacreBLEU has no public names for mean and interval.
        found[name] = Score(
            float(result.score),
            float(result._mean),
            float(result._ci),
            str(metric.get_signature()),
        )
    return found


def score_by_length(
    sources: Sequence[str],
    translations: Sequence[str],
    references: Sequence[str],
    *,
    edges: Sequence[int] = EDGES,
    bootstrap: int = 1000,
) -> list[Json]:
    """BLEU and chrF for classes of sources by their number of words.

    Args:
        sources: sentences.
        translations: one for each.
        references: one for each.
        edges: the most words of each class except the last.
        bootstrap: see :func:`score`.

    Returns:
        For each class that is not empty: ``words`` (such as ``11-20``), ``mean_words``,
        ``sentences`` and the scores.
    """
    counts = np.array([len(s.split()) for s in sources])
    classes = np.searchsorted(np.asarray(edges), counts)
    rows = []
    for index in range(len(edges) + 1):
        members = np.flatnonzero(classes == index).tolist()
        if not members:
            continue
        low = edges[index - 1] + 1 if index else 1
        name = f"{low}-{edges[index]}" if index < len(edges) else f"{low}+"
        found = score(
            [translations[i] for i in members],
            [references[i] for i in members],
            bootstrap=bootstrap,
        )
        rows.append({
            "words": name,
            "mean_words": float(counts[members].mean()),
            "sentences": len(members),
            **{metric: value._asdict() for metric, value in found.items()},
        })
    return rows


def exact_matches(tokens: Any, batch: Batch) -> np.ndarray:
    """Whether each row is right to the last token; rows without example are left out.

    Args:
        tokens: ``[B, L]``: the output of a model after START, END included.
        batch: the batch with the targets.
    """
    tokens, target = np.asarray(tokens), np.asarray(batch.target)
    right = []
    for said, wanted, length in zip(
        tokens, target, np.asarray(batch.target_lengths), strict=True
    ):
        if length > 1:
            expected = wanted[1:length]
            right.append(
                len(said) >= length - 1
                and said[length - 2] == END
                and np.array_equal(said[: length - 1], expected)
            )
    return np.array(right, bool)
