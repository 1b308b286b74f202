"""The problems of ``benchmarks.peers``, and the contenders of each."""

from dataclasses import replace
from typing import Any, NamedTuple

from attnlab._src.bench.cases import Spec
from attnlab._src.bench.contenders import Contender, Implementation
from attnlab._src.bench.peers import PEERS
from attnlab._src.bench.yardsticks import YARDSTICKS

#: attnlab's kernels, in every line. Other times are divided by that of the first that
#: runs.
OURS = ("native", "tiled")


class Problem(NamedTuple):
    """One line of the table.

    Attributes:
        name: for ``--only``.
        group: name of a group of lines, for ``--only``.
        spec: pattern, score, sizes and dtype.
        direction: "forward", or "both": forward and backward together.
        others: the contenders from ``PEERS`` and ``YARDSTICKS``.
    """

    name: str
    group: str
    spec: Spec
    direction: str
    others: tuple[str, ...]

    @property
    def contenders(self) -> tuple[Contender, ...]:
        known = {**PEERS, **YARDSTICKS}
        ours = tuple(Implementation(name) for name in OURS)
        return ours + tuple(known[name] for name in self.others)


def _line(
    name: str, group: str, others: str, pattern: str, length: int, **more: Any
) -> Problem:
    direction = "both" if name.endswith("-both") else "forward"
    spec = Spec(pattern=pattern, length=length, **more)
    return Problem(name, group, spec, direction, tuple(others.split()))


_BF16 = {"dtype": "bfloat16"}
_ADDITIVE = {"score": "additive", "heads": 1, "key_heads": 1}
_LIBRARIES = "torch jax.nn flax.nnx"
#: They have no backward pass.
_RUNTIMES = "onnxruntime openvino zentorch"

# float32, B=1, N=K=8 and H=64 by default; "-both": forward and backward together.
PROBLEMS = (
    _line("dense-2048", "forward", f"torch {_RUNTIMES}", "full", 2048),
    _line("dense-8192", "forward", f"torch {_RUNTIMES}", "full", 8192),
    _line("causal-8192", "forward", f"torch flex {_RUNTIMES}", "causal", 8192),
    _line("window-8192", "forward", f"torch flex jax.nn {_RUNTIMES}", "window", 8192),
    _line("window-16384", "forward", "flex", "window", 16384),
    _line(
        "causal-window-8192",
        "forward",
        f"flex {_RUNTIMES}",
        "causal_window",
        8192,
    ),
    _line("short-128", "forward", f"torch jax.nn {_RUNTIMES}", "full", 128),
    # One query that sees all keys, of 2 and of 8 key heads; in the last line keys and
    # values are larger than the processor's caches.
    *(
        _line(
            name,
            "decode",
            "torch read",
            "full",
            8192,
            batch=batch,
            key_heads=heads,
            query_length=1,
        )
        for name, batch, heads in (
            ("decode-2-key-heads", 1, 2),
            ("decode-8-key-heads", 1, 8),
            ("decode-8-key-heads-batch-4", 4, 8),
        )
    ),
    _line("dense-2048-both", "both", "torch jax.nn", "full", 2048),
    _line("dense-8192-both", "both", "torch", "full", 8192),
    _line("causal-8192-both", "both", "torch", "causal", 8192),
    _line("window-8192-both", "both", "torch jax.nn", "window", 8192),
    _line("one-key-head-4096-both", "both", "torch", "full", 4096, key_heads=1),
    _line("bf16-dense-2048", "bf16", "torch flex", "full", 2048, **_BF16),
    _line("bf16-causal-8192", "bf16", "torch flex", "causal", 8192, **_BF16),
    _line("bf16-window-8192", "bf16", "torch flex", "window", 8192, **_BF16),
    _line("bf16-dense-2048-both", "bf16", "torch", "full", 2048, **_BF16),
    _line("random-8192", "sparse", "flex", "random", 8192),
    _line("big-bird-8192", "sparse", "flex", "big_bird", 8192),
    _line("additive-2048", "additive", "naive", "full", 2048, **_ADDITIVE),
    _line("additive-2048-both", "additive", "naive", "full", 2048, **_ADDITIVE),
    # A step of a recurrent decoder: one query for each of 64 sentences.
    _line(
        "additive-step-both",
        "additive",
        "naive",
        "full",
        48,
        batch=64,
        query_length=1,
        **_ADDITIVE,
    ),
    _line("dense-4096", "libraries", _LIBRARIES, "full", 4096),
    _line("dense-4096-both", "libraries", _LIBRARIES, "full", 4096),
    _line("causal-4096", "libraries", _LIBRARIES, "causal", 4096),
    _line("causal-4096-both", "libraries", _LIBRARIES, "causal", 4096),
)


def small(problem: Problem) -> Problem:
    """The same at a sixteenth of the length, at least 128, for ``--quick``."""
    spec = problem.spec
    return problem._replace(spec=replace(spec, length=max(spec.length // 16, 128)))
