"""Set-up of every test: strict numerics, several CPU devices, quick compilation."""

import functools
import gc
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

#: Compilation takes most of the time, so LLVM's optimisations are switched off. XLA's
#: own passes, which decide about fusion and memory, still run. Programs are not split
#: into parts for several threads, because each part takes extra time.
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
#: The tests of sharding use four devices, a few of them eight.
_NEEDED = ("--xla_force_host_platform_device_count=8",)


def _known(flags):
    """The flags that this XLA knows; an unknown flag ends the process."""
    code = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"

    def fine(flags):
        env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env=env, capture_output=True, check=False)
        return done.returncode == 0

    return flags if fine(flags) else tuple(flag for flag in flags if fine([flag]))


if "ATTNLAB_TESTS" not in os.environ:
    # The main process; the worker processes inherit its environment.
    if "jax" in sys.modules:
        raise RuntimeError(
            "tests/conftest.py must set XLA_FLAGS before jax is imported"
        )
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *_known(_QUICK), *_NEEDED])
    os.environ["ATTNLAB_TESTS"] = tempfile.mkdtemp(prefix="attnlab-tests-")
#: Folder in which the processes of one run share compiled programs and their counts.
SHARED = os.environ["ATTNLAB_TESTS"]
# If libtpu is installed, JAX would look for a TPU and print warnings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import attnlab  # noqa: E402, F401
from attnlab._src.implementations.batched import Batched  # noqa: E402
from attnlab._src.implementations.native import Native  # noqa: E402
from attnlab._src.implementations.tiled import Tiled  # noqa: E402
from attnlab._src.ops.primitive import compute  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
if jax.config.values["jax_compilation_cache_dir"] is None:  # runs may share one, too
    jax.config.update("jax_compilation_cache_dir", os.path.join(SHARED, "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Implicit promotion of ranks and dtypes is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_legacy_prng_key", "error")

# JAX makes an MLIR context for each program that it lowers, which takes longer than
# lowering a small program. Here the programs of one test module share a context. The
# function is private: where it does not exist, nothing is changed.
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
    """Wraps a function of another library to run with JAX's default promotion."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


@pytest.fixture
def loose():
    """JAX's default promotion, for tests that run other libraries."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def verb():
    """The module ``ops.attention``, which the function ``attention`` hides."""
    return sys.modules["attnlab._src.ops.attention"]


def forget():
    """Clears JAX's caches of traces, so that calls are traced again."""
    programs: list[Any] = [verb().compiled_attention, compute]
    for program in programs:
        program.clear_cache()


#: Counts of this process: programs, and those found in the compilation cache.
PROGRAMS = {"asked": 0, "shared": 0}


def _count_asked(event, duration_secs, **_):
    PROGRAMS["asked"] += event == "/jax/core/compile/backend_compile_duration"


def _count_shared(event, **_):
    PROGRAMS["shared"] += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_duration_secs_listener(_count_asked)
jax.monitoring.register_event_listener(_count_shared)


def pytest_collection_finish():
    # Imported objects stay alive: exclude them from garbage collection.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish():
    with open(os.path.join(SHARED, f"count-{os.getpid()}.json"), "w") as file:
        json.dump(PROGRAMS, file)


#: Time, in seconds since 1970, after which no further test begins.
_UNTIL = float(os.environ.get("ATTNLAB_UNTIL", "inf"))
#: Any text: it decides the order of files, so that not always the same are left out.
_ORDER = os.environ.get("ATTNLAB_ORDER")
_TOO_LATE = "the time is over: see ATTNLAB_UNTIL"


#: Names of tests that are slow; see the file.
LONG = frozenset(
    line
    for line in pathlib.Path(__file__).with_name("long.txt").read_text().splitlines()
    if not line.startswith("#")
)


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.slow)
    if _ORDER is not None:
        items.sort(key=lambda x: hashlib.sha256(f"{_ORDER} {x.path}".encode()).digest())


def pytest_runtest_setup():
    if time.time() > _UNTIL:
        pytest.skip(_TOO_LATE)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", ())
    if late := [each.nodeid for each in skipped if _TOO_LATE in str(each.longrepr)]:
        terminalreporter.section(f"NOT RUN, because {_TOO_LATE}: {len(late)} tests")
        for name, cells in itertools.groupby(sorted(late), lambda x: x.split("[")[0]):
            terminalreporter.write_line(f"{len([*cells])} of {name}")
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


#: Compiled programs are kept for the next module below these limits: memory mappings,
#: of which Linux allows 65,530, and bytes.
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
    """``tile(q, k, chunk)`` sets tile sizes, so that small inputs have many tiles."""
    walks = [
        sys.modules[f"attnlab._src.implementations.{name}"]
        for name in ("schedule", "batched")
    ]
    prepare = sys.modules["attnlab._src.ops.prepare"]

    def force(block_q, block_k, chunk=None):
        forget()
        sizes = (block_q, block_k)
        for kind in (Tiled, Batched, Native):
            monkeypatch.setattr(kind, "block_sizes", lambda self, inputs: sizes)
        monkeypatch.setattr(prepare, "_ALIVE_BLOCK", max(sizes))
        for walk, name in itertools.product(walks, ("CHUNK", "LONGEST_CHUNK")):
            monkeypatch.setattr(walk, name, block_k if chunk is None else chunk)
        # A few lanes for many rows, so that a step ends in the middle of a row's run.
        monkeypatch.setattr(walks[1], "STEP_FLOATS", 5 * block_q * (chunk or block_k))

    yield force
    monkeypatch.undo()
    forget()
