"""Other libraries' scaled dot-product attention, as their users call it."""

import importlib.util
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.bench.cases import Case
from attnlab.bench.contenders import Contender, Prepared, compile_call, too_large
from attnlab.types import Array


def _refusal(case: Case) -> str | None:
    if case.spec.score != "scaled_dot":
        return f"it has no {case.spec.score} score"
    return too_large(case)


class JaxNnPeer:
    """``jax.nn.dot_product_attention``; any mask but causal as a dense array."""

    name = "jax.nn"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab.bench.contenders.Contender`."""
        return _refusal(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab.bench.contenders.Contender`."""
        causal = case.spec.pattern == "causal"

        def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> Array:
            return jax.nn.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal
            )

        mask = None if causal else case.dense_mask()
        arguments = (case.query, case.key, case.value, (), mask)
        return compile_call(function, arguments, case.cotangent if backward else None)


class FlaxPeer:
    """``flax.nnx.dot_product_attention``."""

    name = "flax.nnx"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab.bench.contenders.Contender`."""
        if case.spec.heads != case.spec.key_heads:
            return "it has no grouped queries"
        return _refusal(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab.bench.contenders.Contender`."""
        causal = case.spec.pattern == "causal"

        def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> Array:
            return flax.nnx.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal
            )

        mask = None if causal else case.dense_mask()
        arguments = (case.query, case.key, case.value, (), mask)
        return compile_call(function, arguments, case.cotangent if backward else None)


class TorchPeer:
    """PyTorch's ``scaled_dot_product_attention`` on the CPU, all its threads."""

    name = "torch"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab.bench.contenders.Contender`."""
        if jax.default_backend() != "cpu":
            return "it is compared on CPUs only"
        return _refusal(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab.bench.contenders.Contender`."""
        import torch

        def heads_first(x: Array) -> Any:
            # In the layout it likes best, and made before the clock runs.
            wide = np.asarray(x.astype(jnp.float32).swapaxes(1, 2))
            tensor = torch.from_numpy(wide.copy(order="C"))
            return tensor.to(getattr(torch, case.spec.dtype))

        tensors = [heads_first(x) for x in (case.query, case.key, case.value)]
        above = heads_first(case.cotangent)
        causal = case.spec.pattern == "causal"
        dense = None if causal else case.dense_mask()
        mask = None if dense is None else torch.from_numpy(np.array(dense))

        def forward() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors,
                attn_mask=mask,
                is_causal=causal,
                enable_gqa=case.spec.heads != case.spec.key_heads,
            )

        def call() -> Any:
            if backward:
                output = forward()
                return output, *torch.autograd.grad(output, tensors, above)
            with torch.no_grad():
                return (forward(),)

        def results(returned: Any) -> dict[str, Any]:
            names = ("output", "d_query", "d_key", "d_value")[: len(returned)]
            arrays = [t.detach().float().numpy().swapaxes(1, 2) for t in returned]
            return dict(zip(names, arrays, strict=True))

        if backward:
            for tensor in tensors:
                tensor.requires_grad_(True)
        return Prepared(call, results, None, None)


def installed_peers() -> list[Contender]:
    """Every peer that this environment can import."""
    peers: list[Contender] = [JaxNnPeer(), FlaxPeer()]
    if importlib.util.find_spec("torch") is not None:
        peers.append(TorchPeer())
    return peers
