"""How fast is attnlab beside every other library installed here?

Dense and causal attention, a window of +-256, additive attention against the rate at
which this machine evaluates tanh, and what dropout costs; forward, and forward with
backward. Everybody is checked against the reference first.
"""

from dataclasses import replace
from pathlib import Path

from attnlab.bench.cases import Spec
from attnlab.bench.charts import draw
from attnlab.bench.contenders import Implementation
from attnlab.bench.machine import measure_peaks
from attnlab.bench.peers import installed_peers
from attnlab.bench.report import as_record, milliseconds, notes, table
from attnlab.bench.runner import Group, Row, run
from attnlab.bench.text import load_documents
from attnlab.bench.timing import Repeats
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
        Group(replace(plain, pattern="causal", dropout_rate=0.1), ours),
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
    console.print(dropout_line(rows))
    results = {
        "peaks": peaks._asdict(),
        "rows": [as_record(row, peaks) for row in rows],
    }
    write(out, "peers", results)
    draw([r for r in rows if not r.spec.dropout_rate], out, caption(), prefix="peers-")


def dropout_line(rows: list[Row]) -> str:
    """What dropout adds to causal attention, from rows of the same run."""
    dropped = next(r for r in rows if r.spec.dropout_rate)
    plain = replace(dropped.spec, dropout_rate=0.0)
    without = next(
        r.both for r in rows if (r.spec, r.contender) == (plain, dropped.contender)
    )
    with_dropout = dropped.both
    if without is None or with_dropout is None:
        return "dropout: not measured"
    share = with_dropout.timing.median / without.timing.median - 1
    return (
        f"dropout 0.1, causal, forward and backward: {milliseconds(with_dropout)} ms "
        f"against {milliseconds(without)} ms without: {share:+.1%}"
    )


if __name__ == "__main__":
    main()
