"""Set-up of every test: strict numerics, several CPU devices, quick compilation."""

import os
import sys

_FLAGS = (
    # shard_map needs devices; the tests of sharding want at least four.
    "--xla_force_host_platform_device_count=4",
    # Compilation dominates: leave LLVM's optimisations out. XLA's own passes, which
    # decide what is fused and what is held in memory, run all the same.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
if "jax" in sys.modules:
    raise RuntimeError("tests/conftest.py must set XLA_FLAGS before jax is imported")
# Where the TPU's compiler is installed, JAX would look for a TPU, loudly.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import attnlab  # noqa: E402, F401
from attnlab.implementations.native import Native  # noqa: E402
from attnlab.implementations.tiled import Tiled  # noqa: E402
from attnlab.ops.dispatch import compute  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# What careful users set: nothing is broadcast or promoted that nobody asked for.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_legacy_prng_key", "error")

hypothesis.settings.register_profile(
    "attnlab",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("ATTNLAB_EXAMPLES", "20")),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("attnlab")


def verb():
    """The module of the verb; the function of the same name hides it."""
    return sys.modules["attnlab.ops.attention"]


def forget():
    """Lets what was traced before be traced again."""
    verb().run_attention.clear_cache()
    compute.clear_cache()


@pytest.fixture(scope="module", autouse=True)
def leave_no_programs():
    """Each compiled program holds mappings of memory, and Linux allows 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def tile(monkeypatch):
    """``tile(q, k, chunk)``: forces the tiles, so that tiny inputs have many."""
    walk = sys.modules["attnlab.implementations.walk"]
    prepare = sys.modules["attnlab.ops.prepare"]

    def force(block_q, block_k, chunk=None):
        forget()
        sizes = (block_q, block_k)
        for kind in (Tiled, Native):
            monkeypatch.setattr(kind, "block_sizes", lambda self, inputs: sizes)
        monkeypatch.setattr(prepare, "_ALIVE_BLOCK", max(sizes))
        for name in ("CHUNK", "LONGEST_CHUNK"):
            monkeypatch.setattr(walk, name, block_k if chunk is None else chunk)

    yield force
    monkeypatch.undo()
    forget()
