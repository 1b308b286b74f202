"""The studies by name."""

from collections.abc import Callable

from benchmarks.studies.ablations.study import study as ablations
from benchmarks.studies.align.study import study as align
from benchmarks.studies.attention_graph.study import study as attention_graph
from benchmarks.studies.bottleneck.study import study as bottleneck
from benchmarks.studies.crossover.study import study as crossover
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.page import Page
from benchmarks.studies.next_word.study import study as next_word
from benchmarks.studies.patterns_lm.study import study as patterns_lm
from benchmarks.studies.recall.study import study as recall
from benchmarks.studies.scores.study import study as scores
from benchmarks.studies.selection.study import study as selection
from benchmarks.studies.translate.study import study as translate

#: A study returns its page, or None if ``--only`` left out runs that it needs.
Study = Callable[[Context], Page | None]

STUDIES: dict[str, Study] = {
    "translate": translate,
    "bottleneck": bottleneck,
    "scores": scores,
    "align": align,
    "patterns-lm": patterns_lm,
    "attention-graph": attention_graph,
    "crossover": crossover,
    "recall": recall,
    "ablations": ablations,
    "next-word": next_word,
    "selection": selection,
}
