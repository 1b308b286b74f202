"""How fast is attnlab beside every other library installed here?

Dense and causal attention, a window of +-256, additive attention against the rate at
which this machine evaluates tanh, and what dropout costs; forward, and forward with
backward. Everybody is checked against the reference first.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import attention, masks
from attnlab.bench.cases import Spec
from attnlab.bench.charts import draw
from attnlab.bench.contenders import Implementation, Prepared, compile_call
from attnlab.bench.machine import measure_peaks
from attnlab.bench.peers import installed_peers
from attnlab.bench.report import as_record, notes, table
from attnlab.bench.runner import Group, Row, run
from attnlab.bench.text import load_documents
from attnlab.bench.timing import Repeats, interleave
from benchmarks.common import caption, parser, write


def groups(quick: bool, implementation: str) -> list[Group]:
    ours = (Implementation(implementation),)
    peers = tuple(installed_peers())
    # Flax runs what jax.nn runs; at the longest length once is enough.
    fewer = tuple(p for p in peers if p.name != "flax.nnx")
    dense, window, pairs = (512, 1024, 256) if quick else (4096, 8192, 2048)
    plain = Spec(length=dense)
    additive = Spec(score="additive", length=pairs, heads=1, key_heads=1)
    return [
        Group(plain, ours + peers),
        Group(replace(plain, pattern="causal"), ours + peers),
        Group(replace(plain, pattern="window", length=window), ours + fewer),
        Group(additive, ours),
    ]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--implementation", default="tiled", help="ours (tiled)")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    out: Path = given.out
    repeats = 2 if given.quick else given.repeats
    rows: list[Row] = []
    peaks = measure_peaks(("float32",))
    asked = groups(given.quick, given.implementation)
    for measured in run(
        asked, load_documents(), Repeats(repeats, repeats), report=print
    ):
        rows += measured
    peaks = peaks.higher(measure_peaks(("float32",)))

    from rich.console import Console

    console = Console(width=140)
    console.print(table(rows, peaks, caption()))
    for line in notes(rows, peaks):
        console.print(line, markup=False)
    dropout = dropout_cost(given.quick, given.implementation, repeats)
    share = dropout["with"] / dropout["without"] - 1
    console.print(f"dropout 0.1, causal, forward and backward: {share:+.1%}")
    results = {
        "peaks": peaks._asdict(),
        "dropout_seconds": dropout,
        "rows": [as_record(row, peaks) for row in rows],
    }
    write(out, "peers", results)
    draw(rows, out, caption(), prefix="peers-")


def dropout_cost(quick: bool, implementation: str, repeats: int) -> dict[str, float]:
    """What dropout adds to causal attention, both in one interleaved run."""
    length = 512 if quick else 4096
    random = np.random.default_rng(0)
    shape = (1, length, 8, 64)
    arrays = [jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(4)]

    def prepare(rate: float) -> Prepared:
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

        return compile_call(function, (*arrays[:3], (), masks.causal()), arrays[3])

    calls = {"without": prepare(0.0).call, "with": prepare(0.1).call}
    timings = interleave(calls, Repeats(repeats, repeats))
    return {name: timing.median for name, timing in timings.items()}


if __name__ == "__main__":
    main()
