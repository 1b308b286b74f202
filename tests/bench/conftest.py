"""Inputs that the tests of the bench share: small, fixed, not downloaded."""

from typing import Any

import jax.numpy as jnp
import pytest

from attnlab._src.bench.cases import Case, Spec
from attnlab._src.bench.contenders import Implementation, Prepared

#: Sizes differ, so that swapped axes are noticed.
SMALL = Spec(
    pattern="causal", batch=2, length=37, heads=3, key_heads=3, head_size=5, seed=7
)


class Wrong:
    """A contender whose results are wrong."""

    name = "wrong"

    def __init__(self, change: Any):
        self._change = change

    def refusal(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, backward: bool) -> Prepared:
        right = Implementation("reference").prepare(case, backward)

        def results(returned: Any) -> dict[str, Any]:
            return self._change(right.results(returned))

        return right._replace(results=results)


def _shifted(arrays: dict[str, Any]) -> dict[str, Any]:
    return {**arrays, "output": arrays["output"] + 1e-3}


def _without_gradient(arrays: dict[str, Any]) -> dict[str, Any]:
    if "d_key" not in arrays:
        return arrays
    return {**arrays, "d_key": jnp.zeros_like(arrays["d_key"])}


def _not_finite(arrays: dict[str, Any]) -> dict[str, Any]:
    return {**arrays, "output": arrays["output"].at[0, 0, 0, 0].set(jnp.nan)}


def _transposed(arrays: dict[str, Any]) -> dict[str, Any]:
    return {**arrays, "output": arrays["output"].swapaxes(1, 2)}


WRONG = {
    "shifted": _shifted,
    "without gradient": _without_gradient,
    "not finite": _not_finite,
    "transposed": _transposed,
}


@pytest.fixture
def documents() -> list[bytes]:
    return [b"We the People", b"of the United States,", b"in Order to form", b"a more"]


@pytest.fixture
def text_folder(tmp_path: Any) -> Any:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.txt").write_bytes(b"third\n")
    (folder / "a.txt").write_bytes(b"first\nof two lines\r\n \r\nsecond\n\n\n\n")
    (folder / "c.md").write_bytes(b"not text")
    return folder
