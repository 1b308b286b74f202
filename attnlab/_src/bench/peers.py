"""Other libraries' scaled dot-product attention, as their users call it."""

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.bench.cases import WINDOW, Case
from attnlab._src.bench.contenders import Contender, Prepared, compile_call, too_large
from attnlab._src.types import Array


def _refusal(case: Case) -> str | None:
    if case.spec.score != "scaled_dot":
        return f"it has no {case.spec.score} score"
    return None


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    """JAX's own settings of promotion: in 16 bits, peers promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class JaxNnPeer:
    """``jax.nn.dot_product_attention``; any mask but causal as a dense array."""

    name = "jax.nn"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        return _refusal(case) or too_large(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        causal = case.spec.pattern == "causal"

        def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> Array:
            return jax.nn.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal
            )

        mask = None if causal else case.dense_mask()
        arguments = (case.query, case.key, case.value, (), mask)
        with _defaults():
            return compile_call(
                function, arguments, case.cotangent if backward else None
            )


class FlaxPeer:
    """``flax.nnx.dot_product_attention``."""

    name = "flax.nnx"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if case.spec.heads != case.spec.key_heads:
            return "it has no grouped queries"
        return _refusal(case) or too_large(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        causal = case.spec.pattern == "causal"

        def function(query: Any, key: Any, value: Any, score: Any, mask: Any) -> Array:
            return flax.nnx.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal
            )

        mask = None if causal else case.dense_mask()
        arguments = (case.query, case.key, case.value, (), mask)
        with _defaults():
            return compile_call(
                function, arguments, case.cotangent if backward else None
            )


def _torch_refusal(case: Case) -> str | None:
    if not _installed("torch"):
        return "torch is not installed"
    if jax.default_backend() != "cpu":
        return "it is compared on CPUs only"
    return _refusal(case)


def _tensor(array: Array) -> Any:
    """``[B, T, N, H]`` as torch likes it best: heads first, contiguous."""
    import torch

    wide = np.asarray(array.astype(jnp.float32).swapaxes(1, 2))
    tensor = torch.from_numpy(wide.copy(order="C"))
    return tensor.to(getattr(torch, array.dtype.name))


def _arrays(tensors: tuple[Any, ...]) -> dict[str, Any]:
    names = ("output", "d_query", "d_key", "d_value")[: len(tensors)]
    arrays = [t.detach().float().numpy().swapaxes(1, 2) for t in tensors]
    return dict(zip(names, arrays, strict=True))


class TorchPeer:
    """PyTorch's ``scaled_dot_product_attention`` on the CPU, all its threads."""

    name = "torch"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        return _torch_refusal(case) or too_large(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        import torch

        tensors = [_tensor(x) for x in (case.query, case.key, case.value)]
        above = _tensor(case.cotangent)
        causal = case.spec.pattern == "causal"
        dense = None if causal else case.dense_mask()
        mask = None if dense is None else torch.from_numpy(np.array(dense))

        group = case.spec.heads // case.spec.key_heads

        def forward() -> Any:
            query, *shared = tensors
            if backward and group > 1:
                # A third of the time that it takes through enable_gqa.
                shared = [x.repeat_interleave(group, 1) for x in shared]
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                *shared,
                attn_mask=mask,
                is_causal=causal,
                enable_gqa=not backward and group > 1,
            )

        def call() -> Any:
            if backward:
                output = forward()
                return output, *torch.autograd.grad(output, tensors, above)
            with torch.no_grad():
                return (forward(),)

        if backward:
            for tensor in tensors:
                tensor.requires_grad_(True)
        return Prepared(call, _arrays, None, None)


class FlexPeer:
    """PyTorch's FlexAttention, compiled, with the blocks of the mask made beforehand.

    It skips dead blocks and applies the rule in those that are partly visible, as
    attnlab does. The rule is arithmetic where a user would write it so, else a table.
    """

    name = "flex"

    #: Of a block of its mask: on random blocks of 64 several times as fast as its own
    #: choice of 128, and as fast elsewhere.
    BLOCK_SIZE = 64

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        compiler = os.environ.get("CXX", "g++")
        if _installed("torch") and shutil.which(compiler) is None:
            return f"torch.compile needs a C++ compiler, and there is no {compiler}"
        is_table = case.spec.pattern not in ("full", *RULES)
        return _torch_refusal(case) or (too_large(case) if is_table else None)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if backward:
            raise NotImplementedError("FlexAttention has no backward pass on CPUs")
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        spec = case.spec
        tensors = [_tensor(x) for x in (case.query, case.key, case.value)]
        # It would give up compiling after some eight problems, and run unfused.
        torch._dynamo.reset()
        blocks = None
        if spec.pattern != "full":
            # Compiled, it finds the blocks of a rule without holding every pair.
            is_rule = spec.pattern in RULES
            create = torch.compile(create_block_mask) if is_rule else create_block_mask
            blocks = create(
                _rule(case),
                B=spec.batch if spec.pattern == "documents" else None,
                H=None,
                Q_LEN=spec.queries,
                KV_LEN=spec.length,
                device="cpu",
                BLOCK_SIZE=self.BLOCK_SIZE,
            )
        compiled = torch.compile(flex_attention, dynamic=False)

        def call() -> Any:
            with torch.no_grad():
                return (
                    compiled(
                        *tensors,
                        block_mask=blocks,
                        enable_gqa=spec.heads != spec.key_heads,
                    ),
                )

        start = time.perf_counter()
        call()
        return Prepared(call, _arrays, time.perf_counter() - start, None)


#: Patterns as arithmetic, which needs no table of every pair.
RULES: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: i >= j,
    "window": lambda b, h, i, j: (i - j).abs() <= WINDOW,
    "causal_window": lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
}


def _rule(case: Case) -> Callable[..., Any]:
    """Whether query ``i`` sees key ``j``, as FlexAttention asks."""
    import torch

    if case.spec.pattern in RULES:
        return RULES[case.spec.pattern]
    table = torch.from_numpy(np.array(case.dense_mask())[:, 0])
    if len(table) == 1:
        # Without the examples' index its kernel is simpler.
        return lambda b, h, i, j, seen=table[0]: seen[i, j]
    return lambda b, h, i, j: table[b, i, j]


#: By name, as tables show them. FlexAttention compiles for long and has no backward
#: pass on CPUs: it runs where it is asked for.
PEERS: dict[str, Contender] = {
    peer.name: peer for peer in (JaxNnPeer(), FlaxPeer(), TorchPeer(), FlexPeer())
}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def installed_peers() -> list[Contender]:
    """Every peer that this environment can import, but FlexAttention."""
    names = ["jax.nn", "flax.nnx"] + (["torch"] if _installed("torch") else [])
    return [PEERS[name] for name in names]
