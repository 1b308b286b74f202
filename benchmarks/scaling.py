"""How do time and memory per token change with the length and with the density?

For a window of +-256 both are constant; for causal attention the time grows with the
length. At one length, windows of growing width show time against density.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from attnlab import attention, masks
from attnlab._src.bench.contenders import Prepared, compile_call
from attnlab._src.bench.timing import Repeats, interleave
from attnlab.masks import Mask
from benchmarks.common import parser, save_lines, write

HEADS, HEAD_SIZE = 8, 64


def prepare(length: int, mask: Mask, implementation: str, backward: bool) -> Prepared:
    random = np.random.default_rng(0)
    shape = (1, length, HEADS, HEAD_SIZE)
    query, key, value, above = (
        jax.numpy.asarray(random.standard_normal(shape, np.float32)) for _ in range(4)
    )

    def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> jax.Array:
        return attention(query, key, value, mask=mask, implementation=implementation)

    arguments = (query, key, value, (), mask)
    return compile_call(function, arguments, above if backward else None)


def problems(quick: bool) -> Iterator[tuple[str, int, Mask]]:
    lengths = (512, 1024, 2048) if quick else tuple(2**n for n in range(12, 18))
    longest_dense = 1024 if quick else 8192
    for length in lengths:
        yield "window", length, masks.sliding_window(256, 256)
        if length <= longest_dense:
            yield "causal", length, masks.causal()
    for width in (32, 64, 128) if quick else (64, 128, 256, 512, 1024, 2048, 4096):
        yield "density", lengths[1], masks.sliding_window(width, width)


def measure(
    series: str, length: int, mask: Mask, implementation: str, repeats: int
) -> dict[str, Any]:
    prepared = {
        "forward": prepare(length, mask, implementation, False),
        "both": prepare(length, mask, implementation, True),
    }
    calls = {name: p.call for name, p in prepared.items()}
    timings = interleave(calls, Repeats(repeats, repeats))
    return {
        "series": series,
        "length": length,
        "mask": repr(mask),
        "density": mask.density(length),
        "seconds": {name: t._asdict() for name, t in timings.items()},
        "temporary_bytes": {name: p.temporary_bytes for name, p in prepared.items()},
        "compile_seconds": {name: p.compile_seconds for name, p in prepared.items()},
    }


def chart(folder: Any, rows: list[dict[str, Any]]) -> None:
    def points(series: str, direction: str, what: str) -> list[tuple[float, float]]:
        found = []
        for row in rows:
            if row["series"] != series:
                continue
            x = row["density"] if series == "density" else row["length"]
            seconds = row["seconds"][direction]["median"]
            per_token = 1e6 * seconds / row["length"]
            memory = row["temporary_bytes"][direction] / row["length"]
            found.append((x, per_token if what == "time" else memory))
        return found

    names = {"forward": "forward", "both": "forward and backward"}
    by_length = {
        title: {
            f"{series}, {name}": points(series, direction, what)
            for series in ("window", "causal")
            for direction, name in names.items()
        }
        for title, what in (
            ("microseconds a token", "time"),
            ("bytes of temporaries a token", "memory"),
        )
    }
    save_lines(folder, "scaling", by_length, "length T = S")
    length = next(r["length"] for r in rows if r["series"] == "density")
    by_density = {
        f"microseconds a token at {length:,}": {
            name: points("density", direction, "time")
            for direction, name in names.items()
        }
    }
    save_lines(folder, "scaling-density", by_density, "density")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--implementation", default="tiled")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    repeats = 2 if given.quick else given.repeats
    rows = []
    for series, length, mask in problems(given.quick):
        row = measure(series, length, mask, given.implementation, repeats)
        rows.append(row)
        forward, both = (
            1e6 * row["seconds"][d]["median"] / length for d in ("forward", "both")
        )
        print(
            f"{series:8} T={length:7,} density {row['density']:7.2%}: forward "
            f"{forward:8.2f}, forward+backward {both:8.2f} microseconds a token",
            flush=True,
        )
        # Written after each row, so that an interrupted run keeps its results.
        write(given.out, "scaling", {"rows": rows})
    chart(given.out, rows)


if __name__ == "__main__":
    main()
