"""Description of the machine, and measurement of its peak rates."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab._src.bench.timing import timed

_PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "numpy", "torch")


class Peaks(NamedTuple):
    """Greatest rates measured on this machine in this run.

    Attributes:
        matmul: FLOP/s of a large matrix product, by dtype name.
        tanh: evaluations of tanh per second, float32.
    """

    matmul: dict[str, float]
    tanh: float

    def higher(self, other: "Peaks") -> "Peaks":
        """The greater of two measurements, for each rate."""
        matmul = {k: max(v, other.matmul.get(k, 0.0)) for k, v in self.matmul.items()}
        return Peaks(matmul, max(self.tanh, other.tanh))


def _key_value_file(path: str, wanted: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    found = (line.partition(":")[2] for line in lines if line.startswith(wanted))
    return next(found, "").strip() or None


def cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int | None:
    """Bytes of main memory; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory() -> int:
    """Bytes free for new arrays on the device; a guess if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    available = _key_value_file("/proc/meminfo", "MemAvailable")
    if available:
        return int(available.split()[0]) * 1024
    return (total_memory() or 8 << 30) // 2


def processor() -> str:
    """The processor, with family and model where they are known."""
    model = _key_value_file("/proc/cpuinfo", "model name")
    model = model or platform.processor() or platform.machine()
    # In some clouds processors of several generations have the same name.
    family = _key_value_file("/proc/cpuinfo", "cpu family")
    if family:
        model += (
            f" (family {family}, model {_key_value_file('/proc/cpuinfo', 'model')})"
        )
    return model


def machine_line() -> str:
    """Processor (and accelerator), cores and memory in one line."""
    memory = total_memory()
    parts = [processor(), "1 core" if cores() == 1 else f"{cores()} cores"]
    if memory:
        parts.append(f"{memory / 2**30:.0f} GiB")
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        parts.append(f"{jax.local_device_count()} x {device.device_kind}")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Versions of Python and of the compared packages that are installed."""
    result = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def peak_resident_memory() -> int | None:
    """Peak main memory of this process in bytes; None if unknown."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in KiB elsewhere.
    return peak if platform.system() == "Darwin" else peak * 1024


def _best(call: Callable[[], object], repeats: int = 4) -> float:
    timed(call)
    return min(timed(call) for _ in range(repeats))


def _matmul_rate(dtype: str, size: int) -> float:
    x = jnp.full((size, size), 0.5, dtype)
    call = jax.jit(jnp.matmul).lower(x, x).compile()
    return 2 * size**3 / _best(lambda: call(x, x))


def _tanh_rate(size: int = 512, units: int = 64) -> float:
    # Adds to a tile that stays in cache, so that memory does not limit the rate.
    x = jnp.linspace(-2, 2, units * size, dtype=jnp.float32).reshape(units, size)
    weight = jnp.ones(units)

    def evaluate(x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
        def unit(p: jax.Array, total: jax.Array) -> jax.Array:
            return total + weight[p] * jnp.tanh(x[p][:, None] + y[p][None, :])

        return jax.lax.fori_loop(0, units, unit, jnp.zeros((size, size)))

    call = jax.jit(evaluate).lower(x, x, weight).compile()
    return size * size * units / _best(lambda: call(x, x, weight), 8)


def read_everything(x: jax.Array) -> jax.Array:
    """Sums of parts of an array: reads it once, with all threads."""
    return x.reshape(64, -1).sum(1)


def measure_read_rate(size: int = 1 << 29) -> float:
    """Bytes per second that all threads read from main memory.

    Args:
        size: bytes of the array, more than fit into caches.
    """
    x = jnp.ones(size // 4, jnp.float32)
    call = jax.jit(read_everything).lower(x).compile()
    return size / _best(lambda: call(x), 8)


def measure_peaks(dtypes: tuple[str, ...], size: int = 2048) -> Peaks:
    """Measures the rates of matrix products and of tanh.

    Args:
        dtypes: names of the matrices' types.
        size: number of rows of the square matrices.
    """
    return Peaks({d: _matmul_rate(d, size) for d in dtypes}, _tanh_rate())
