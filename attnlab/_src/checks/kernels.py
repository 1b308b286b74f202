"""Checks the laws of an implementation, on the problems that it takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.checks.compare import Problem, agrees
from attnlab._src.checks.parts import Sizes, vmap_is_a_loop
from attnlab._src.checks.report import Checker, Report
from attnlab._src.masks.data import documents, lengths, predicate
from attnlab._src.masks.layouts import random_blocks
from attnlab._src.masks.per_head import per_head
from attnlab._src.masks.structural import causal, sliding_window
from attnlab._src.modifiers.bias import bias, soft_cap
from attnlab._src.modifiers.relative import alibi
from attnlab._src.ops.attention import attention_with_stats
from attnlab._src.ops.registration import registered_for_now
from attnlab._src.scores.inner import Bilinear, Cosine, Dot
from attnlab._src.scores.pairwise import Additive, Mlp
from attnlab._src.types import Array, Implementation


def _problems(sizes: Sizes) -> dict[str, Problem]:
    """Problems of each kind by name; an implementation may refuse some of them."""
    b, t, s, n, k, h, _ = sizes
    rng, data = np.random.default_rng(3), sizes.arrays()
    key = jax.random.key(4)
    heads = {"num_heads": n, "num_key_heads": k}
    float32 = np.float32

    def of(
        rate: float = 0.0, fixed: dict[str, Any] | None = None, **more: Any
    ) -> Problem:
        moving = jax.tree.map(np.asarray, data | more)
        return Problem(moving, {} if fixed is None else fixed, rate)

    kinds = (causal(), sliding_window(3, 4))
    return {
        "full": of(),
        "causal": of(fixed={"mask": causal()}),
        "window": of(fixed={"mask": sliding_window(3, 2)}),
        "documents": of(
            fixed={"mask": documents(np.arange(t) // 5, np.arange(s) // 5)}
        ),
        "lengths": of(fixed={"mask": lengths(key=np.arange(b) + s - b)}),
        "random blocks": of(
            fixed={
                "mask": random_blocks(
                    num_blocks=8, blocks_per_row=2, rng=key, block_size=4
                )
            }
        ),
        "a rule of the user's": of(fixed={"mask": predicate(_even)}),
        "a mask for each head": of(
            fixed={"mask": per_head([kinds[i % 2] for i in range(n)])}
        ),
        "bias": of(modifiers=(bias(rng.normal(size=(b, n, t, s)).astype(float32)),)),
        "soft cap": of(modifiers=(soft_cap(3.0),)),
        "ALiBi": of(modifiers=(alibi(rng.random(n).astype(float32)),)),
        "dot": of(score=Dot()),
        "cosine": of(score=Cosine(np.full(n, 3, float32))),
        "bilinear": of(score=Bilinear.init(key, h, h, num_heads=n)),
        "additive": of(score=Additive.init(key, h, hidden_size=6, **heads)),
        "MLP": of(score=Mlp.init(key, h, hidden_sizes=(6, 3), **heads)),
        "dropout": of(0.3, {"dropout_rng": key}),
        "sinks": of(sinks=rng.normal(size=n).astype(float32)),
        "positions": of(
            fixed={
                "mask": causal(),
                "query_positions": np.arange(t, dtype=np.int32) + 2,
                "key_positions": rng.permutation(s).astype(np.int32),
            }
        ),
    }


def _even(t: Array, s: Array) -> Array:
    return (t + s) % 2 == 0


def check_implementation(made: Implementation, sizes: Sizes) -> Report:
    """Checks the laws of an implementation; see :func:`attnlab.extend.check`."""
    with registered_for_now(made):
        checker = Checker(f"implementation {made.name}")
        _check(checker, made.name, sizes)
    return checker.report()


def _check(checker: Checker, name: str, sizes: Sizes) -> None:
    taken = 0
    for what, problem in _problems(sizes).items():
        for dtype in (np.float32, jnp.bfloat16):
            label = f"{what}, {jnp.dtype(dtype)}: it computes what the reference does"
            with checker.law(label, may_refuse=True):
                agrees(problem, name, dtype)
                taken += 1
    with checker.law("it takes some problem"):
        assert taken, "every one was refused"
    data = sizes.arrays()
    options: dict[str, Any] = {"implementation": name}
    law = "a query that sees nothing: output 0, log-sum-exp -inf"
    with checker.law(law, may_refuse=True):
        mask = causal() & ~causal()
        found = attention_with_stats(**data, mask=mask, **options)
        assert (np.asarray(found.output) == 0).all(), "the output is not 0"
        assert np.isneginf(found.lse).all(), "the log-sum-exp is not -inf"
    vmap_is_a_loop(checker, sizes, options)
