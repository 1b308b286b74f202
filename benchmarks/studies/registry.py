"""The studies by name. A name that begins with ``_`` is not listed."""

from collections.abc import Callable

from benchmarks.studies import align, bottleneck, scores, smoke, translate
from benchmarks.studies.context import Context
from benchmarks.studies.page import Page

#: A study returns its page; None where ``--only`` left out runs that it needs.
Study = Callable[[Context], Page | None]

STUDIES: dict[str, Study] = {
    "translate": translate.study,
    "bottleneck": bottleneck.study,
    "scores": scores.study,
    "align": align.study,
    "_smoke": smoke.study,
}
