"""Set-up of every test: strict numerics, several CPU devices, quick compilation."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

#: Compilation dominates, so LLVM's optimisations are left out. XLA's own passes, which
#: decide what is fused and what is held in memory, run all the same. A program is not
#: split into parts that several threads compile: each part costs time of its own.
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
#: shard_map needs devices; the tests of sharding want at least four.
_NEEDED = ("--xla_force_host_platform_device_count=4",)


def _known(flags):
    """Those flags that this XLA knows: it ends a process that names another one."""
    code = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"

    def fine(flags):
        env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env=env, capture_output=True, check=False)
        return done.returncode == 0

    return flags if fine(flags) else tuple(flag for flag in flags if fine([flag]))


if "ATTNLAB_TESTS" not in os.environ:
    # In the process that the others are started from; they inherit what it finds.
    if "jax" in sys.modules:
        raise RuntimeError("tests/conftest.py must set XLA_FLAGS before jax comes")
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *_known(_QUICK), *_NEEDED])
    os.environ["ATTNLAB_TESTS"] = tempfile.mkdtemp(prefix="attnlab-tests-")
#: Where the processes of one run share what they compile, and tell how much it was.
SHARED = os.environ["ATTNLAB_TESTS"]
# Where the TPU's compiler is installed, JAX would look for a TPU, loudly.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import attnlab  # noqa: E402, F401
from attnlab._src.implementations.native import Native  # noqa: E402
from attnlab._src.implementations.tiled import Tiled  # noqa: E402
from attnlab._src.ops.primitive import compute  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
if jax.config.values["jax_compilation_cache_dir"] is None:  # runs may share one, too
    jax.config.update("jax_compilation_cache_dir", os.path.join(SHARED, "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# What careful users set: nothing is broadcast or promoted that nobody asked for.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_legacy_prng_key", "error")

# JAX makes an MLIR context for each program that it lowers, which takes longer than to
# lower a small one. Here the programs of one module of tests share it. The function is
# private: a JAX that has none of this name works as it does by itself.
_mlir: Any = sys.modules.get("jax._src.interpreters.mlir")
if hasattr(_mlir, "make_ir_context"):
    _mlir.make_ir_context = functools.cache(_mlir.make_ir_context)

hypothesis.settings.register_profile(
    "attnlab",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("ATTNLAB_EXAMPLES", "20")),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("attnlab")


def loosely(function):
    """A function of another library, which promotes as JAX does by default."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


@pytest.fixture
def loose():
    """For tests that run modules of another library in types that these promote."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def verb():
    """The module of the verb; the function of the same name hides it."""
    return sys.modules["attnlab._src.ops.attention"]


def forget():
    """Lets what was traced before be traced again."""
    programs: list[Any] = [verb().run_attention, compute]
    for program in programs:
        program.clear_cache()


#: Of this process: programs asked for, and how many of these were compiled before.
PROGRAMS = {"asked": 0, "shared": 0}


def _count_asked(event, duration_secs, **_):
    PROGRAMS["asked"] += event == "/jax/core/compile/backend_compile_duration"


def _count_shared(event, **_):
    PROGRAMS["shared"] += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_duration_secs_listener(_count_asked)
jax.monitoring.register_event_listener(_count_shared)


def pytest_collection_finish():
    # What was imported stays: nothing in it need be looked at, again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish():
    with open(os.path.join(SHARED, f"count-{os.getpid()}.json"), "w") as file:
        json.dump(PROGRAMS, file)


def pytest_terminal_summary(terminalreporter):
    counts = []
    for name in os.listdir(SHARED):
        if name.startswith("count-"):
            with open(os.path.join(SHARED, name)) as file:
                counts.append(json.load(file))
    asked, shared = (sum(c[name] for c in counts) for name in ("asked", "shared"))
    terminalreporter.write_line(
        f"jax {jax.__version__}: {asked:,} programs, {asked - shared:,} compiled"
    )


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(SHARED, ignore_errors=True)


#: Compiled programs are kept for the next module while they take less than this:
#: mappings of memory, of which Linux allows 65,530, and bytes.
_MOST_MAPPINGS, _MOST_BYTES = 30_000, 3 * 2**30


@pytest.fixture(scope="module", autouse=True)
def leave_few_programs():
    yield
    if hasattr(_mlir, "make_ir_context"):
        _mlir.make_ir_context.cache_clear()
    try:
        with open("/proc/self/maps") as maps, open("/proc/self/statm") as sizes:
            resident = int(sizes.read().split()[1]) * os.sysconf("SC_PAGESIZE")
            crowded = len(maps.readlines()) > _MOST_MAPPINGS or resident > _MOST_BYTES
    except OSError:  # not Linux
        crowded = True
    if crowded:
        jax.clear_caches()


@pytest.fixture
def tile(monkeypatch):
    """``tile(q, k, chunk)``: forces the tiles, so that tiny inputs have many."""
    walk = sys.modules["attnlab._src.implementations.schedule"]
    prepare = sys.modules["attnlab._src.ops.prepare"]

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
