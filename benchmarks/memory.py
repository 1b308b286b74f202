"""How much memory does attention need besides its inputs and outputs?

Peak temporary memory, according to the compiler, of the forward pass and of forward and
backward together, compared with the largest tensor of a naive program. Nothing is run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab import attention, masks, scores
from attnlab._src.types import Score
from attnlab.masks import Mask
from benchmarks.common import parser, write


class Problem(NamedTuple):
    """A name, the arguments, and the floats in a naive program's largest tensor."""

    name: str
    length: int
    heads: int
    score: Score
    mask: Mask
    naive: int


def problems(quick: bool) -> list[Problem]:
    length, hidden = (1024 if quick else 8192), 64
    additive = scores.additive.init(jax.random.key(0), 64, hidden_size=hidden)
    dot, pairs = scores.scaled_dot(), length * length
    window = masks.sliding_window(256, 256)
    return [
        Problem("additive", length, 1, additive, masks.full(), pairs * hidden),
        Problem("additive, window", length, 1, additive, window, pairs * hidden),
        Problem("dense", length, 8, dot, masks.full(), 8 * pairs),
        Problem("causal", length, 8, dot, masks.causal(), 8 * pairs),
        Problem("window", length, 8, dot, window, 8 * pairs),
    ]


def temporary_bytes(problem: Problem, implementation: str, backward: bool) -> int:
    shape = (1, problem.length, problem.heads, 64)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def forward(query: Any, key: Any, value: Any, score: Any) -> jax.Array:
        return attention(
            query,
            key,
            value,
            score=score,
            mask=problem.mask,
            implementation=implementation,
        )

    def both(query: Any, key: Any, value: Any, score: Any, above: Any) -> Any:
        output, pull = jax.vjp(forward, query, key, value, score)
        return output, pull(above)

    arguments = (x, x, x, problem.score) + ((x,) if backward else ())
    lowered = jax.jit(both if backward else forward).lower(*arguments)
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise SystemExit("this backend does not report the memory of a program")
    return int(analysis.temp_size_in_bytes)


def chart(folder: Any, rows: list[dict[str, Any]]) -> None:
    from attnlab._src.bench.charts import plain_log, plt, save
    from benchmarks.common import caption

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    shown = {
        "naive_bytes": ("one tensor of a naive program", "#999999"),
        "both_bytes": ("all temporaries, forward and backward", "#0072B2"),
        "forward_bytes": ("all temporaries, forward", "#56B4E9"),
    }
    for offset, (name, (label, colour)) in enumerate(shown.items()):
        places = [i + 0.27 * (offset - 1) for i in range(len(rows))]
        sizes = [row[name] / 1e6 for row in rows]
        bars = axis.barh(places, sizes, 0.25, label=label, color=colour)
        axis.bar_label(bars, [f"{s:,.0f}" for s in sizes], padding=3, fontsize=8)
    plain_log(axis.xaxis)
    axis.margins(x=0.1)
    axis.set_xlabel("MB, log scale")
    axis.set_yticks(range(len(rows)), [row["problem"] for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.invert_yaxis()
    axis.set_title(f"T = S = {rows[0]['length']:,}", fontsize=10)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(caption(), fontsize=8, color="0.35")
    save(figure, folder, "memory", kinds=("svg",))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--implementation", default="tiled")
    given = options.parse_args()
    rows = []
    for problem in problems(given.quick):
        forward, both = (
            temporary_bytes(problem, given.implementation, b) for b in (False, True)
        )
        rows.append({
            "problem": problem.name,
            "length": problem.length,
            "heads": problem.heads,
            "forward_bytes": forward,
            "both_bytes": both,
            "naive_bytes": 4 * problem.naive,
        })
        print(
            f"{problem.name:18} T={problem.length:,} N={problem.heads}: forward "
            f"{forward / 1e6:,.1f} MB, forward+backward {both / 1e6:,.1f} MB; a naive "
            f"program's tensor {4 * problem.naive / 1e6:,.0f} MB",
            flush=True,
        )
    write(given.out, "memory", {"rows": rows})
    chart(given.out, rows)


if __name__ == "__main__":
    main()
