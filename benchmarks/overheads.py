"""Overheads: of a call, of compiling, of the package's libraries, of dropout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab import attention, masks, scores
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.contenders import Prepared, attending, compile_call
from attnlab._src.bench.timing import Repeats, interleave, summarise
from benchmarks.problems import OURS

#: By name: a number, or the reason why there is none.
Values = dict[str, float | str]


def _arguments(spec: Spec) -> tuple[Any, ...]:
    random = np.random.default_rng(0)
    shape = (spec.batch, spec.length, spec.heads, spec.head_size)
    arrays = [jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(3)]
    return *arrays, scores.scaled_dot(), masks.causal()


def _trivial(query: Any, key: Any, value: Any, score: Any, mask: Any) -> jax.Array:
    return query + key + value


def _prepared(spec: Spec, backward: bool) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Attnlab's kernels and a trivial program, compiled; and reasons for refusals."""
    arguments = _arguments(spec)
    above = arguments[0] if backward else None
    ready, reasons = {"trivial": compile_call(_trivial, arguments, above)}, {}
    for name in OURS:
        try:
            ready[name] = compile_call(attending(name), arguments, above)
        except (NotImplementedError, ValueError) as error:
            reasons[name] = str(error)
    return ready, reasons


def _beyond_trivial(seconds: dict[str, float], scale: float) -> Values:
    trivial = seconds["trivial"]
    ours = {n: scale * (s - trivial) for n, s in seconds.items() if n != "trivial"}
    return {"trivial": scale * trivial, **ours}


def call_overhead(quick: bool) -> Values:
    """Microseconds by which a tiny compiled call exceeds a trivial compiled one."""
    calls = 200
    ready, reasons = _prepared(Spec(length=8, heads=1, head_size=8), backward=False)

    def many(prepared: Prepared) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                jax.block_until_ready(prepared.call())

        return run

    repeats = Repeats(3, 3) if quick else Repeats(21, 21)
    timings = interleave({n: many(p) for n, p in ready.items()}, repeats)
    seconds = {name: timing.median / calls for name, timing in timings.items()}
    return {**_beyond_trivial(seconds, 1e6), **reasons}


def compile_time(quick: bool) -> Values:
    """Seconds of tracing and compiling beyond those of a trivial program.

    Each program is forward and backward.
    """
    samples: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for _ in range(1 if quick else 5):
        jax.clear_caches()
        ready, reasons = _prepared(Spec(length=128 if quick else 2048), backward=True)
        for name, prepared in ready.items():
            samples.setdefault(name, []).append(prepared.compile_seconds or 0.0)
    medians = {name: summarise(s).median for name, s in samples.items()}
    return {**_beyond_trivial(medians, 1.0), **reasons}


def built_files(quick: bool) -> Values:
    """Kilobytes of each compiled library in the package."""
    room = Path(attnlab.__file__).parent
    found = [p for kind in ("so", "dylib", "pyd") for p in room.rglob(f"*.{kind}")]
    if not found:
        return {"native": "the package holds no built file"}
    return {str(p.relative_to(room)): p.stat().st_size / 1e3 for p in found}


def dropout(quick: bool) -> Values:
    """Milliseconds of causal attention, forward and backward, dropout 0 and 0.1."""
    *arrays, score, mask = _arguments(Spec(length=512 if quick else 4096))

    def prepare(implementation: str, rate: float) -> Prepared:
        def function(
            query: Any, key: Any, value: Any, score: Any, mask: Any
        ) -> jax.Array:
            return attention(
                query,
                key,
                value,
                mask=mask,
                dropout_rate=rate,
                dropout_rng=jax.random.key(0) if rate else None,
                implementation=implementation,
            )

        return compile_call(function, (*arrays, score, mask), arrays[0])

    calls, reasons = {}, {}
    for name in OURS:
        for rate in (0.0, 0.1):
            label = f"{name}, dropout {rate:g}"
            try:
                calls[label] = prepare(name, rate).call
            except (NotImplementedError, ValueError) as error:
                reasons[label] = str(error)
    timings = interleave(calls, Repeats(2, 2) if quick else Repeats(5, 15))
    return {**{n: 1e3 * t.median for n, t in timings.items()}, **reasons}


#: By name for ``--only``: the function that measures, and its unit.
OVERHEADS: dict[str, tuple[Callable[[bool], Values], str]] = {
    "call-overhead": (call_overhead, "us"),
    "compile-time": (compile_time, "s"),
    "built-files": (built_files, "kB"),
    "dropout": (dropout, "ms"),
}
