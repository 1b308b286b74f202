"""How large are the errors of outputs and gradients for 16-bit inputs?

Errors are root mean squares, relative to that of the exact values, which the reference
computes in float64 from the same inputs. The line "stored" is the error of the exact
values rounded to the dtype of the inputs. Logits have a standard deviation of 9, so
most weights are close to 0 or 1. Matrix products have JAX's default precision.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import attention
from benchmarks.common import parser, write

HEAD_SIZES = (64, 128)
DTYPES = ("bfloat16", "float16")
WHAT = ("output", "d_query", "d_key", "d_value")


def arrays(length: int, head_size: int, dtype: Any) -> list[np.ndarray]:
    """Query, key, value and the gradient of the output, ``[1, length, 2, H]``."""
    random = np.random.default_rng(0)
    shape = (1, length, 2, head_size)
    return [(random.standard_normal(shape) * x).astype(dtype) for x in (3, 3, 1, 1)]


def both_passes(attend: Callable[..., jax.Array], given: list[Any]) -> list[Any]:
    """The output, and the gradients of query, key and value: see ``WHAT``."""
    output, pull = jax.vjp(attend, *given[:3])
    return [output, *pull(given[3])]


def ours(name: str) -> Callable[..., jax.Array]:
    return jax.jit(lambda q, k, v: attention(q, k, v, implementation=name))


def errors(found: list[Any], exact: list[Any]) -> list[float]:
    """Root mean square error of each array over the root mean square of ``exact``."""

    def one(x: Any, y: Any) -> float:
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        return float(np.sqrt(np.square(x - y).mean() / np.square(y).mean()))

    return [one(*pair) for pair in zip(found, exact, strict=True)]


def rows(length: int) -> Iterator[dict[str, Any]]:
    """For each dtype, head size and contender the errors that ``WHAT`` names."""
    contenders = {name: ours(name) for name in ("reference", "tiled", "native")}
    # Not jitted: XLA for CPUs refuses the float16 products that it would contain.
    contenders["jax.nn"] = jax.nn.dot_product_attention
    for dtype in DTYPES:
        for head_size in HEAD_SIZES:
            given = arrays(length, head_size, jnp.dtype(dtype))
            with jax.enable_x64(True):
                wide = [x.astype(np.float64) for x in given]
                exact = both_passes(ours("reference"), wide)
            exact = [np.asarray(x) for x in exact]
            found = {"stored": [x.astype(jnp.dtype(dtype)) for x in exact]}
            on_device = [jnp.asarray(x) for x in given]
            for name, attend in contenders.items():
                found[name] = both_passes(attend, on_device)
            for name, made in found.items():
                measured = dict(zip(WHAT, errors(made, exact), strict=True))
                yield {"dtype": dtype, "head_size": head_size, "by": name, **measured}


def main() -> None:
    given = parser(__doc__ or "").parse_args()
    length = 64 if given.quick else 512
    print("| inputs | H | by | " + " | ".join(WHAT) + " |")
    print("| --- " * (3 + len(WHAT)) + "|")
    all_rows = []
    for row in rows(length):
        numbers = " | ".join(f"{1e3 * row[name]:.2f}" for name in WHAT)
        print(f"| {row['dtype']} | {row['head_size']} | {row['by']} | {numbers} |")
        all_rows.append(row)
    write(given.out, "precision", {"length": length, "rows": all_rows})


if __name__ == "__main__":
    main()
