"""Contenders that call other libraries' scaled dot-product attention."""

import contextlib
import importlib
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
from attnlab._src.bench.contenders import (
    Contender,
    Prepared,
    compile_call,
    installed,
    refused_on_cpus,
    refused_score,
    too_large,
)
from attnlab._src.bench.runtimes import OnnxRuntimePeer, OpenVinoPeer
from attnlab._src.types import Array


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    """Sets JAX's default type and rank promotion, which peers need in 16 bits."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class JaxNnPeer:
    """``jax.nn.dot_product_attention``; masks other than causal are dense arrays."""

    name = "jax.nn"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        return refused_score(case) or too_large(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        causal = case.spec.pattern == "causal"

        def function(
            query: Array, key: Array, value: Array, score: tuple[()], mask: Array | None
        ) -> Array:
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
        return refused_score(case) or too_large(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        causal = case.spec.pattern == "causal"

        def function(
            query: Array, key: Array, value: Array, score: tuple[()], mask: Array | None
        ) -> Array:
            return flax.nnx.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal
            )

        mask = None if causal else case.dense_mask()
        arguments = (case.query, case.key, case.value, (), mask)
        with _defaults():
            return compile_call(
                function, arguments, case.cotangent if backward else None
            )


def _tensor(array: Array) -> Any:
    """A torch tensor of ``[B, T, N, H]``: heads before positions, contiguous."""
    import torch

    wide = np.asarray(array.astype(jnp.float32).swapaxes(1, 2))
    tensor = torch.from_numpy(wide.copy(order="C"))
    return tensor.to(getattr(torch, array.dtype.name))


def _arrays(tensors: tuple[Any, ...]) -> dict[str, np.ndarray]:
    names = ("output", "d_query", "d_key", "d_value")[: len(tensors)]
    arrays = [t.detach().float().numpy().swapaxes(1, 2) for t in tensors]
    return dict(zip(names, arrays, strict=True))


class TorchPeer:
    """PyTorch's ``scaled_dot_product_attention`` on the CPU, with all threads."""

    name = "torch"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        return refused_on_cpus(case, "torch") or too_large(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        import torch

        attend = self._attend()
        tensors = [_tensor(x) for x in (case.query, case.key, case.value)]
        above = _tensor(case.cotangent)
        causal = case.spec.pattern == "causal"
        dense = None if causal else case.dense_mask()
        mask = None if dense is None else torch.from_numpy(np.array(dense))

        group = case.spec.heads // case.spec.key_heads

        def forward() -> Any:
            query, *shared = tensors
            if backward and group > 1:
                # Takes a third of the time of enable_gqa=True.
                shared = [x.repeat_interleave(group, 1) for x in shared]
            return attend(
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

    def _attend(self) -> Callable[..., Any]:
        import torch

        return torch.nn.functional.scaled_dot_product_attention


class ZentorchPeer(TorchPeer):
    """The same, compiled by AMD's zentorch, which needs AVX-512."""

    name = "zentorch"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        missing = refused_on_cpus(case, "torch", "zentorch")
        if missing is not None:
            return missing
        import torch

        if "AVX512" not in torch.backends.cpu.get_cpu_capability():
            return "it needs AVX-512"
        return super().refusal(case)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if backward:
            raise NotImplementedError("zentorch has no backward pass")
        made = super().prepare(case, backward)
        start = time.perf_counter()
        made.call()
        return made._replace(compile_seconds=time.perf_counter() - start)

    def _attend(self) -> Callable[..., Any]:
        import torch

        importlib.import_module("zentorch")  # it registers itself
        torch._dynamo.reset()
        return torch.compile(super()._attend(), backend="zentorch")


class FlexPeer:
    """PyTorch's FlexAttention, compiled, with a block mask made beforehand.

    It skips dead blocks and applies the mask function in partial blocks, as attnlab
    does. The function is arithmetic for the patterns in ``RULES``, else a table lookup.
    """

    name = "flex"

    #: Block size of its mask: several times as fast as its default of 128 on random
    #: blocks of 64, and equally fast on other patterns.
    BLOCK_SIZE = 64

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        compiler = os.environ.get("CXX", "g++")
        if installed("torch") and shutil.which(compiler) is None:
            return f"torch.compile needs a C++ compiler, and there is no {compiler}"
        is_table = case.spec.pattern not in ("full", *RULES)
        return refused_on_cpus(case, "torch") or (too_large(case) if is_table else None)

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if backward:
            raise NotImplementedError("FlexAttention has no backward pass on CPUs")
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        spec = case.spec
        tensors = [_tensor(x) for x in (case.query, case.key, case.value)]
        # Without a reset, it stops compiling after about eight problems and runs
        # unfused.
        torch._dynamo.reset()
        blocks = None
        if spec.pattern != "full":
            # Compiled, create_block_mask does not store every pair of a rule.
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


#: Patterns as arithmetic mask functions, without a table of every pair.
RULES: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: i >= j,
    "window": lambda b, h, i, j: (i - j).abs() <= WINDOW,
    "causal_window": lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
}


def _rule(case: Case) -> Callable[..., Any]:
    """The mask function for FlexAttention: whether query i attends to key j."""
    import torch

    if case.spec.pattern in RULES:
        return RULES[case.spec.pattern]
    table = torch.from_numpy(np.array(case.dense_mask())[:, 0])
    if len(table) == 1:
        # The kernel is simpler without the index of the example.
        return lambda b, h, i, j, seen=table[0]: seen[i, j]
    return lambda b, h, i, j: table[b, i, j]


#: All peers by name. FlexAttention, which takes long to compile, and the runtimes have
#: no backward pass on CPUs: they are not in ``installed_peers``.
PEERS: dict[str, Contender] = {
    peer.name: peer
    for peer in (
        JaxNnPeer(),
        FlaxPeer(),
        TorchPeer(),
        FlexPeer(),
        OnnxRuntimePeer(),
        OpenVinoPeer(),
        ZentorchPeer(),
    )
}


def installed_peers() -> list[Contender]:
    """Every installed peer that has a backward pass."""
    names = ["jax.nn", "flax.nnx"] + (["torch"] if installed("torch") else [])
    return [PEERS[name] for name in names]
