"""``check``, which takes scores, modifiers, masks and implementations."""

from attnlab._src import arguments
from attnlab._src.checks.kernels import check_implementation
from attnlab._src.checks.parts import Sizes, check_mask, check_modifier, check_score
from attnlab._src.checks.report import Report
from attnlab._src.masks.base import Mask
from attnlab._src.types import Implementation, Modifier, Score


def check(
    thing: Score | Modifier | Mask | Implementation,
    *,
    batch: int = 2,
    query_length: int = 13,
    key_length: int = 19,
    num_heads: int = 4,
    num_key_heads: int = 2,
    head_size: int = 8,
    query_size: int | None = None,
) -> Report:
    """Checks that a score, a modifier, a mask or an implementation keeps the laws.

    It evaluates small attention problems with random numbers, with each implementation
    that runs here. Values and every gradient must be about as close to the dense
    reference in float64 as the reference itself is in the type of the inputs. A mask's
    ``bounds`` are compared with its ``visible``. It takes ten seconds to two minutes,
    nearly all of it for compiling.

    Args:
        thing: what to check. An implementation need not be registered.
        batch: B. Give the sizes that the arrays of ``thing`` need.
        query_length: T, the number of queries.
        key_length: S, the number of keys.
        num_heads: N, the number of query heads.
        num_key_heads: K, the number of key heads.
        head_size: H of keys, and D.
        query_size: H of queries, where the score takes another; ``head_size`` if not
            given.

    Returns:
        What was checked; print it.

    Raises:
        LawBroken: an ``AssertionError`` that lists everything that was checked, and
            what is wrong.
        TypeError: if ``thing`` is none of the four.

    Example:
        >>> from attnlab import extend, masks
        >>> print(extend.check(masks.causal()))  # doctest: +SKIP
    """
    sizes = Sizes(
        arguments.size("batch", batch),
        arguments.size("query_length", query_length),
        arguments.size("key_length", key_length),
        arguments.size("num_heads", num_heads),
        arguments.size("num_key_heads", num_key_heads),
        arguments.size("head_size", head_size),
        arguments.size("query_size", head_size if query_size is None else query_size),
    )
    if isinstance(thing, Score):
        return check_score(thing, sizes)
    if isinstance(thing, Modifier):
        return check_modifier(thing, sizes)
    if isinstance(thing, Mask):
        return check_mask(thing, sizes)
    if isinstance(thing, Implementation):
        return check_implementation(thing, sizes)
    raise TypeError(
        "thing: expected a Score, a Modifier, a Mask or an Implementation, got "
        f"{thing.__name__ + ': call it' if isinstance(thing, type) else type(thing)}"
    )
