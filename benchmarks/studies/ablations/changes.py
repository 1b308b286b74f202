"""The changes of the base model, each tried alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from attnlab import nn, scores
from benchmarks.studies.machinery.models.language_models import Budget, Sizes

RATE = 2e-3
#: Both rates are tried for changes whose best rate may differ from the base's.
RATES = (1e-3, 2e-3)
SEEDS = 3


BUDGET = Budget(steps=500, length=256, rows=8)
QUICK = Budget(4, 32, 4, 400, limit=12, test=2, dev=2, sizes=Sizes(16, 2, 1))


class Change(NamedTuple):
    """A change of the base model.

    Attributes:
        options: ``(budget, rngs)`` to options of ``language_model``.
        heads: number of heads; the base's if None.
        causal: True: predict the next token; False: predict hidden tokens.
        rates: learning rates to try; the best run counts.
    """

    options: Callable[[Budget, nnx.Rngs], Mapping[str, Any]]
    heads: int | None = None
    causal: bool = True
    rates: Sequence[float] = (RATE,)


def _nothing(budget: Budget, rngs: nnx.Rngs) -> Mapping[str, Any]:
    return {}


def _attention(**bound: Any) -> Callable[[Budget, nnx.Rngs], Mapping[str, Any]]:
    made = functools.partial(nn.MultiHeadAttention, **bound)
    return lambda budget, rngs: {"attention": made}


def _residual(make: Any, **options: Any) -> Any:
    return lambda budget, rngs: {"residual": make, **options}


def _embedded(position: Callable[[Budget, nnx.Rngs], Any]) -> Any:
    """Options of positions that are added to the embeddings, or of none."""

    def options(budget: Budget, rngs: nnx.Rngs) -> Mapping[str, Any]:
        return {"position": None, "embedded_position": position(budget, rngs)}

    return options


def _clipped(budget: Budget, rngs: nnx.Rngs) -> Mapping[str, Any]:
    size = budget.sizes.features // budget.sizes.heads
    reach = min(64, budget.length // 2)

    def make() -> nn.ClippedRelative:
        return nn.ClippedRelative(size, left=reach, right=reach, rngs=rngs)

    return {"position": make}


POSITIONS = {
    "none": _embedded(lambda budget, rngs: None),
    "sinusoidal": _embedded(lambda budget, rngs: nn.Sinusoidal()),
    "learned": _embedded(
        lambda budget, rngs: nn.Learned(budget.length, budget.sizes.features, rngs=rngs)
    ),
    "clipped relative": _clipped,
    "rotary": _nothing,
}
KINDS = ("causal", "masked")


def placed(kind: str) -> dict[str, str]:
    """Names of the runs with each kind of positions.

    Args:
        kind: one of :data:`KINDS`.
    """
    return {label: f"{kind}/{label.replace(' ', '-')}" for label in POSITIONS}


#: With this initialiser, queries and keys of normalised inputs have components of
#: variance 1, as the paper assumes where it explains the scale (footnote 4). With
#: Glorot's the variance depends on the head size.
UNIT = nnx.initializers.lecun_normal()
HEAD_SIZES, HEAD_COUNTS = (16, 64, 256), (1, 2, 4, 8, 16)
RESIDUALS = {
    "pre-norm": _nothing,
    "post-norm": _residual(nn.PostNorm),
    "no norm": _residual(nn.Residual, norm=None),
    "no residual": _residual(nn.NoResidual, last_norm=True),
}
#: The changes by name. The base has rotary positions, pre-norm and four heads.
CHANGES: dict[str, Change] = {
    "base": Change(_nothing),
    **{
        f"{name}/{size}": Change(
            _attention(score=getattr(scores, name)(), head_size=size, kernel_init=UNIT),
            rates=RATES,
        )
        for size in HEAD_SIZES
        for name in ("dot", "scaled_dot")
    },
    **{f"heads/{n}": Change(_nothing, heads=n) for n in HEAD_COUNTS},
    **{
        name: Change(POSITIONS[label], causal=kind == "causal")
        for kind in KINDS
        for label, name in placed(kind).items()
    },
    **{
        f"residual/{name.replace(' ', '-')}": Change(options, rates=RATES)
        for name, options in RESIDUALS.items()
    },
}
#: Changes that the quick form leaves out, because each takes seconds to compile.
NOT_QUICK = {
    *(f"{name}/64" for name in ("dot", "scaled_dot")),
    *(f"heads/{n}" for n in (2, 8, 16)),
    *(f"causal/{name}" for name in ("sinusoidal", "learned", "clipped-relative")),
    *(f"masked/{name}" for name in ("sinusoidal", "clipped-relative")),
}
#: Changes that equal the base, which are not trained again.
SAME = {
    "heads/4": "base",
    "causal/rotary": "base",
    "residual/pre-norm": "base",
}
