"""The studies by name."""

from collections.abc import Callable

from benchmarks.studies import (
    ablations,
    align,
    attention_graph,
    bottleneck,
    crossover,
    patterns_lm,
    recall,
    scores,
    translate,
)
from benchmarks.studies.context import Context
from benchmarks.studies.page import Page

#: A study returns its page; None where ``--only`` left out runs that it needs.
Study = Callable[[Context], Page | None]

STUDIES: dict[str, Study] = {
    "translate": translate.study,
    "bottleneck": bottleneck.study,
    "scores": scores.study,
    "align": align.study,
    "patterns-lm": patterns_lm.study,
    "attention-graph": attention_graph.study,
    "crossover": crossover.study,
    "recall": recall.study,
    "ablations": ablations.study,
}
