"""Reports what the kernels of a program need on an NVIDIA GPU, without a device.

XLA's plugin and NVIDIA's assembler (``pip install "attnlab[gpu-aot]"``) run on any
Linux machine. They tell registers, spills and instructions of each kernel that is
written in Mosaic GPU. Stall counts are cycles that the assembler makes a warp wait
after an instruction. Their sum over a loop is no time, as warps take turns, and wait
for memory besides: compare such sums with each other.

Each program is compiled by a process of its own, as some kernels crash the compiler.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.export

from attnlab._src.bench.targets import CompilerMissing, leaves_only, run_compiler
from attnlab._src.files import cache_folder, write_atomically
from attnlab._src.types import PyTree


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU, as XLA describes it.

    Attributes:
        kind: JAX's name of the device.
        capability: compute capability, major and minor.
        multiprocessors: how many it has.
        cache: bytes of the cache that they share.
        memory: bytes of memory.
        bandwidth: bytes of memory that it moves in a second.
        shared: bytes of shared memory of a multiprocessor.
        block_shared: bytes of it that a thread block may use.
        clock: GHz.
        products: operations of products of 16-bit numbers in a second, from the
            card's data sheet.
    """

    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    cache: int
    memory: int
    bandwidth: int
    shared: int
    block_shared: int
    clock: float
    products: float

    def config(self) -> str:
        """The text from which XLA makes a topology without a device."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  threads_per_core_limit: 2048
  core_count: {self.multiprocessors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.block_shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.kind}"
"""


#: Cards by the name that ``target=`` takes.
CARDS = {
    "gpu:a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 41_943_040, 84_974_239_744,
        2_039_000_000_000, 167_936, 166_912, 1.41, 312e12,
    ),
    "gpu:h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 52_428_800, 84_942_979_072,
        3_352_320_000_000, 233_472, 232_448, 1.98, 989e12,
    ),
    "gpu:b200": Card(
        "NVIDIA B200", (10, 0), 148, 132_644_864, 191_000_000_000,
        8_000_000_000_000, 233_472, 232_448, 1.965, 2250e12,
    ),
}  # fmt: skip

#: Kinds of instructions, by the start of their names.
KINDS = {
    "tensor core": ("HGMMA", "UTCHMMA", "HMMA"),
    "bulk copy": ("UTMALDG", "UTMASTG"),
    "exponential": ("MUFU.EX2",),
    "branch": ("BRA",),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of a kernel with products on tensor cores.

    Attributes:
        instructions: in its body; loops that wait count once.
        products: of these, on tensor cores.
        stalls: sum of the stall counts of its instructions.
    """

    instructions: int
    products: int
    stalls: int


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """One kernel in Mosaic GPU.

    Attributes:
        name: of the kernel.
        registers: of a thread, on average over the warpgroups.
        spills: bytes that a thread stores for lack of registers.
        instructions: in the code, by the names of ``KINDS``, and "all".
        loops: in the order of the code; the loop over full blocks comes first.
    """

    name: str
    registers: int
    spills: int
    instructions: dict[str, int]
    loops: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True)
class GpuStudy:
    """The compilers' report on a program.

    Attributes:
        target: a name in ``CARDS``.
        kernels: kernels in Mosaic GPU, in the order of their names.
        temporary: bytes of memory besides arguments and results.
        why: why there is no report, else None.
    """

    target: str
    kernels: tuple[GpuKernel, ...] = ()
    temporary: int = 0
    why: str | None = None

    def kernel(self, start: str) -> GpuKernel | None:
        """The first kernel whose name starts with ``start``, or None."""
        return next((k for k in self.kernels if k.name.startswith(start)), None)


def gpu_study(
    fn: Callable[..., PyTree],
    *shapes: PyTree,
    target: str,
    timeout: float = 600.0,
    cache: Path | None = None,
) -> GpuStudy:
    """Compiles a function for a GPU, without a device.

    Args:
        fn: a function of pytrees of arrays; jitted here.
        *shapes: its arguments, with ``jax.ShapeDtypeStruct`` for arrays.
        target: a name in ``CARDS``.
        timeout: seconds until the compiler is stopped.
        cache: folder of earlier reports; one in the user's cache if not given.

    Raises:
        ValueError: if there is no such target.
        CompilerMissing: if a part of the compiler is not installed.

    Returns:
        The compilers' report; ``why`` says why there is none.
    """
    if target not in CARDS:
        raise ValueError(f"target: expected one of {', '.join(CARDS)}, got {target!r}")
    missing = [name for name, found in parts().items() if not found]
    if missing:
        raise CompilerMissing(
            f"{' and '.join(missing)} not found: the GPU's compiler comes with "
            'pip install "attnlab[gpu-aot]"'
        )
    made = jax.export.export(jax.jit(fn), platforms=("cuda",))(*shapes)
    program = leaves_only(made)
    cache = cache_folder() / "targets" if cache is None else cache
    said = hashlib.sha256(re.sub(r"loc\(.*?\)", "", program.mlir_module()).encode())
    said.update(f"{target} {version('jaxlib')} {_assembler()} 1".encode())
    path = cache / f"{said.hexdigest()[:32]}.json"
    if path.exists():
        return read(json.loads(path.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        source, dumps = Path(folder, "program"), Path(folder, "dumps")
        source.write_bytes(program.serialize())
        dumps.mkdir()
        command = [sys.executable, "-m", "attnlab._src.bench.gpu_deviceless"]
        command += [target, str(source), str(dumps)]
        settings = {"MOSAIC_GPU_DUMP_TO": str(dumps), "JAX_PLATFORMS": "cpu"}
        found = run_compiler(command, settings, timeout)
    if found is None:
        found = {"why": "the compiler crashed"}
    stopped = found.pop("stopped", False)
    content = {"target": target, **found}
    if not stopped and "why" not in found:
        write_atomically(path, json.dumps(content, indent=1).encode())
    return read(content)


def read(content: dict[str, Any]) -> GpuStudy:
    """The study in a cached file, or in the output of a compiler process."""
    rest = dict(content)
    kernels = []
    for kernel in rest.pop("kernels", ()):
        loops = tuple(Loop(**x) for x in kernel.pop("loops"))
        kernels.append(GpuKernel(loops=loops, **kernel))
    return GpuStudy(kernels=tuple(kernels), **rest)


def parts() -> dict[str, Path | None]:
    """What must be installed, by name: where it is, or None."""
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    found = next(filter(None, map(_spec, plugins)), None)
    root = cuda_root()
    tools = {
        name: root / "bin" / name if root and (root / "bin" / name).exists() else None
        for name in ("ptxas", "nvdisasm")
    }
    return {"jax-cuda13-plugin": found, **tools}


def _spec(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(str(spec.origin)) if spec else None


def cuda_root() -> Path | None:
    """The folder of NVIDIA's assembler and disassembler, as their wheels install it."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for folder in sorted(Path(place).glob("cu*"), reverse=True):
            if (folder / "bin").is_dir():
                return folder
    return None


def _assembler() -> str:
    """The version of NVIDIA's assembler."""
    try:
        return version("nvidia-cuda-nvcc")
    except PackageNotFoundError:
        return "unknown"


#: A line of code with its stall count, instruction and operands.
_LINE = re.compile(
    r"^\s*\S*:\S:\S:\S:(\d+)\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?(\S+)(.*)"
)
_LABEL = re.compile(r"^(\.L_\S+):")


def kernels_of(dumps: Path) -> Iterator[dict[str, Any]]:
    """The records of ``GpuKernel`` in a folder of dumps."""
    for path in sorted(dumps.glob("*.sass_ctrl")):
        told = path.with_suffix(".ptxas").read_text()
        code, loops = read_code(path.read_text())
        yield {
            "name": _stem(path),
            "registers": max(map(int, re.findall(r"Used (\d+) registers", told))),
            "spills": max(map(int, re.findall(r"(\d+) bytes spill stores", told))),
            "instructions": code,
            "loops": loops,
        }


def _stem(path: Path) -> str:
    """The name of a kernel, without the number that makes its file's name unique."""
    return re.sub(r"_\d+$", "", path.stem)


def read_code(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Counts of instructions, and the records of ``Loop``, of a disassembled kernel."""
    names: list[str] = []
    stalls: list[int] = []
    labels: dict[str, int] = {}
    back: list[tuple[int, int]] = []
    for line in text.splitlines():
        label, found = _LABEL.match(line), _LINE.match(line)
        if label:
            labels[label[1]] = len(names)
        if not found:
            continue
        target = re.search(r"\((\.L_\S+?)\)", found[3])
        if found[2].startswith("BRA") and target and target[1] in labels:
            back.append((labels[target[1]], len(names)))
        names.append(found[2])
        stalls.append(int(found[1]))

    def count(kind: str, where: slice) -> int:
        return sum(name.startswith(KINDS[kind]) for name in names[where])

    bodies = [slice(first, last + 1) for first, last in back]
    # Some loops jump back from far behind, where the code that waits is: of bodies that
    # overlap, the shortest is the innermost one.
    apart: list[slice] = []
    for body in sorted(bodies, key=lambda body: body.stop - body.start):
        alone = all(x.stop <= body.start or body.stop <= x.start for x in apart)
        if alone and count("tensor core", body):
            apart.append(body)
    loops = [
        {
            "instructions": body.stop - body.start,
            "products": count("tensor core", body),
            "stalls": sum(stalls[body]),
        }
        for body in sorted(apart, key=lambda body: body.start)
    ]
    return {"all": len(names), **{k: count(k, slice(None)) for k in KINDS}}, loops
