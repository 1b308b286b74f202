"""Selects the cells of the grid pattern x score x implementation to measure."""

from collections.abc import Sequence

from attnlab._src.bench.cases import PAIRWISE, PATTERNS, SCORES, Spec
from attnlab._src.bench.contenders import Contender, Implementation
from attnlab._src.bench.options import Options
from attnlab._src.bench.peers import installed_peers
from attnlab._src.bench.runner import Group
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.ops.choice import default_platform, other_platforms

#: Implementations that store all logits; they are compared on a few problems only.
DENSE = ("jax_nn", "reference")

#: The default selection, with every pattern, score and contender at least once. Maps
#: pattern and score to the dense implementations and peers that are also measured.
COVERING: dict[tuple[str, str], tuple[str, ...]] = {
    ("full", "scaled_dot"): ("jax.nn", "flax.nnx", "torch"),
    ("window", "scaled_dot"): ("jax_nn", "torch"),
    ("full", "additive"): ("reference",),
    ("causal", "scaled_dot"): ("jax.nn", "torch"),
    ("longformer", "scaled_dot"): (),
    ("causal", "bilinear"): (),
    ("window", "cosine"): (),
    ("causal_window", "mlp"): (),
    # Last, as masks with arrays take longest to compile.
    ("documents", "scaled_dot"): ("torch",),
    ("big_bird", "scaled_dot"): (),
    ("random", "additive"): (),
}

QUICK: dict[tuple[str, str], tuple[str, ...]] = {
    ("causal_window", "scaled_dot"): (),
    ("full", "additive"): (),
    ("full", "scaled_dot"): ("jax.nn", "torch"),
}


def _spec(options: Options, pattern: str, score: str, dtype: str) -> Spec:
    heads = options.heads or (1 if score in PAIRWISE else 8)
    key_heads = options.key_heads or heads
    return Spec(
        pattern,
        score,
        dtype,
        options.batch,
        options.length,
        heads,
        # With one head there can be only one key head.
        min(key_heads, heads),
        options.head_size,
        seed=options.seed,
    )


def _grid(options: Options) -> list[tuple[str, str, tuple[str, ...]]]:
    """Pattern, score, and the names of the dense implementations and peers."""
    everyone = (*DENSE, "jax.nn", "flax.nnx", "torch")
    patterns, scores = options.patterns, options.scores
    if options.full or (patterns and scores):
        return [
            (p, s, everyone) for s in scores or SCORES for p in patterns or PATTERNS
        ]
    if patterns:
        return [(p, "scaled_dot", everyone) for p in patterns]
    if scores:
        return [(p, s, everyone) for s in scores for p in ("full", "window")]
    chosen = QUICK if options.quick else COVERING
    return [(p, s, beside) for (p, s), beside in chosen.items()]


def select(options: Options, peers: Sequence[Contender] | None = None) -> list[Group]:
    """The groups to measure, in this order.

    Args:
        options: options of the command line.
        peers: other libraries; those installed if not given.
    """
    found = (installed_peers() if peers is None else peers) if options.peers else []
    groups: list[Group] = []
    for dtype in options.dtypes:
        for pattern, score, beside in _grid(options):
            names = options.implementations or tuple(
                name
                for name, made in IMPLEMENTATIONS.items()
                if name not in DENSE and not other_platforms(made, default_platform())
            )
            extra = [n for n in beside if n in IMPLEMENTATIONS and n not in names]
            if options.implementations:
                extra = []
            others: list[Contender] = [Implementation(n) for n in extra]
            if score == "scaled_dot":
                others += [p for p in found if p.name in beside]
            groups.append(
                Group(
                    _spec(options, pattern, score, dtype),
                    tuple(Implementation(n) for n in names),
                    tuple(others),
                )
            )
    return groups
