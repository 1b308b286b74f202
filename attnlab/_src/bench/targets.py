"""Estimates the cost of a program on a TPU by the TPU's compiler, without a device.

The compiler (``pip install "attnlab[tpu-aot]"``) runs on any Linux machine. It reports
its static schedule: cycles, slots of instructions, spills, memory. These are estimates
by the compiler: compare them with each other; they are not times.

The flags for these reports are undocumented and may crash the compiler; so each program
is compiled by a process of its own, and a crash yields no numbers.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export

from attnlab._src.files import cache_folder, write_atomically
from attnlab._src.types import PyTree


@dataclasses.dataclass(frozen=True)
class Target:
    """A generation of TPUs.

    Attributes:
        topology: name of the smallest topology that the compiler knows.
        accelerator: value of ``TPU_ACCELERATOR_TYPE`` for the compiler.
        device_kind: JAX's name of a device.
        cores: number of cores of a device.
        multiplies: multiply-adds of a core's matrix units per cycle.
        elementwise: numbers that a core's function unit processes per cycle.
    """

    topology: str
    accelerator: str
    device_kind: str
    cores: int
    multiplies: int
    elementwise: int = 1024


#: Targets by the name that ``target=`` takes.
TARGETS = {
    "tpu:v4": Target("v4:2x2x1", "v4-8", "TPU v4", 2, 65_536),
    "tpu:v5e": Target("v5e:2x2", "v5litepod-4", "TPU v5 lite", 1, 65_536),
    "tpu:v5p": Target("v5p:2x2x1", "v5p-8", "TPU v5", 2, 65_536),
    "tpu:v6e": Target("v6e:2x2", "v6e-4", "TPU v6 lite", 1, 262_144),
    "tpu:tpu7x": Target("tpu7x:2x2x1", "tpu7x-8", "TPU7x", 1, 262_144),
}

#: Targets for which the compiler reports the cycles of our kernels.
TOLD = ("tpu:v5e", "tpu:v5p", "tpu:v6e")

#: Instruction slots that the compiler counts in each bundle.
SLOTS = (
    "MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE",
    "VSTORE:SPILL", "SALU",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program: a Pallas kernel or a fusion of XLA.

    Attributes:
        name: name of the kernel.
        cycles: static estimate, including memory transfers; None if not reported.
        memory: bytes of vector memory; None if not reported.
        bundles: number of instruction bundles in its schedule; loop bodies count once.
        slots: for each name in ``SLOTS``, the fraction in use.
        fills: number of loads of spilled registers in the code.
        spills: number of stores of spilled registers in the code.
    """

    name: str
    cycles: int | None
    memory: int | None
    bundles: int
    slots: dict[str, float]
    fills: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Study:
    """The compiler's report on a program.

    Attributes:
        target: a name in ``TARGETS``.
        kernels: the kernels, sorted by name; those that the compiler names itself
            (``<...``, ``TLP...``) are left out.
        temporary: bytes of memory besides arguments and results.
        arguments: bytes of the arguments.
        results: bytes of the results.
        why: why there is no report, or no cycles; else None.
    """

    target: str
    kernels: tuple[Kernel, ...] = ()
    temporary: int = 0
    arguments: int = 0
    results: int = 0
    why: str | None = None

    @property
    def cycles(self) -> int | None:
        """Sum over all kernels, each counted once; None if not reported."""
        found = [k.cycles for k in self.kernels if k.cycles is not None]
        return sum(found) if found else None

    def kernel(self, start: str) -> Kernel | None:
        """The first kernel whose name starts with ``start``, or None."""
        return next((k for k in self.kernels if k.name.startswith(start)), None)


class CompilerMissing(RuntimeError):
    """The TPU compiler is not installed."""


def on(target: str) -> jax.sharding.use_abstract_mesh:
    """A context in which programs are traced and lowered for a target, device or not.

    Args:
        target: a name in ``TARGETS``.
    """
    known = TARGETS[target]
    device = jax.sharding.AbstractDevice(known.device_kind, known.cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(
    fn: Callable[..., PyTree], shapes: Sequence[PyTree], target: str
) -> jax.export.Exported:
    """Lowers a program for a target, so that another process can read it.

    Args:
        fn: a function of pytrees of arrays.
        shapes: its arguments, with ``jax.ShapeDtypeStruct`` for arrays.
        target: a name in ``TARGETS``.

    Returns:
        The exported program as a function of leaves that returns leaves, as the other
        process may not know the pytrees' types.
    """
    with on(target):
        made = jax.export.export(jax.jit(fn), platforms=("tpu",))(*shapes)
    return leaves_only(made)


def leaves_only(program: jax.export.Exported) -> jax.export.Exported:
    """A program as a function of leaves that returns leaves."""
    return dataclasses.replace(
        program,
        in_tree=jax.tree.structure((tuple(program.in_avals), {})),
        out_tree=jax.tree.structure(tuple(program.out_avals)),
    )


def study(
    fn: Callable[..., PyTree],
    *shapes: PyTree,
    target: str,
    timeout: float = 1800.0,
    cache: Path | None = None,
) -> Study:
    """Compiles a function for a TPU, without a device.

    Args:
        fn: a function of pytrees of arrays; jitted here.
        *shapes: its arguments, with ``jax.ShapeDtypeStruct`` for arrays.
        target: a name in ``TARGETS``.
        timeout: seconds until the compiler is stopped.
        cache: folder of earlier reports; one in the user's cache if not given.

    Raises:
        ValueError: if there is no such target.
        CompilerMissing: if libtpu or flatbuffers is not installed.

    Returns:
        The compiler's report; ``why`` says why something is missing in it.
    """
    if target not in TARGETS:
        raise ValueError(
            f"target: expected one of {', '.join(TARGETS)}, got {target!r}"
        )
    missing = [m for m in ("libtpu", "flatbuffers") if not importlib.util.find_spec(m)]
    if missing:
        raise CompilerMissing(
            f"{' and '.join(missing)} not found: "
            'the TPU compiler comes with pip install "attnlab[tpu-aot]"'
        )
    program = lowered(fn, shapes, target)
    cache = cache_folder() / "targets" if cache is None else cache
    path = cache / f"{_identity(program.mlir_module(), target)}.json"
    if path.exists():
        return read(json.loads(path.read_text()))
    found = _compile(program, target, timeout, profile=True)
    if found is None or "why" in found:
        # The profile fails most often: compile without it.
        reason = "the compiler crashed" if found is None else found["why"]
        stopped = found is not None and found.get("stopped", False)
        found = _compile(program, target, timeout, profile=False)
        if found is None:
            return Study(target, why=reason)
        found.setdefault("why", f"no cycles: {reason}")
        found["stopped"] = stopped or found.get("stopped", False)
    # A compiler that was stopped may succeed another time: not cached.
    final = not found.pop("stopped", False)
    content = {"target": target, **found}
    made = read(content)
    if made.kernels and final:
        write_atomically(path, json.dumps(content, indent=1).encode())
    return made


def read(content: dict[str, Any]) -> Study:
    """The study in a cached file, or in the output of a compiler process."""
    rest = dict(content)
    kernels = tuple(Kernel(**k) for k in rest.pop("kernels", ()))
    return Study(kernels=kernels, **rest)


def _identity(program: str, target: str) -> str:
    """A hash of all that the report depends on, without source locations."""
    text = re.sub(r"^#loc.*\n?| loc\((#loc\d*|\"[^\"]*\")\)", "", program, flags=re.M)
    said = hashlib.sha256(text.encode())
    said.update(f"{target} {version('jaxlib')} {version('libtpu')} 3".encode())
    return said.hexdigest()[:32]


def _compile(
    program: jax.export.Exported, target: str, timeout: float, *, profile: bool
) -> dict[str, Any] | None:
    """Compiles in a process of its own; None if that crashes without a message."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program")
        source.write_bytes(program.serialize())
        dumps = Path(folder, "dumps")
        dumps.mkdir()
        known = TARGETS[target]
        flags = [
            f"--xla_jf_dump_to={dumps}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=.*final.*",
        ]
        if profile:
            flags.append(f"--xla_jf_dump_static_llo_profile_to={dumps}")
        settings = {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": known.accelerator,
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": " ".join(flags),
        }
        command = [sys.executable, "-m", "attnlab._src.bench.deviceless"]
        command += [known.topology, str(source), str(dumps)]
        return run_compiler(command, settings, timeout)


def run_compiler(
    command: Sequence[str], settings: dict[str, str], timeout: float
) -> dict[str, Any] | None:
    """Runs a process that prints a line of JSON; None if it crashes without a message.

    Args:
        command: the command.
        settings: environment variables besides the caller's.
        timeout: seconds until it is stopped.
    """
    # The caller's XLA_FLAGS would change the result.
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    try:
        done = subprocess.run(
            command,
            env={**kept, **settings},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        why = f"the compiler took more than {timeout:.0f} s"
        return {"why": why, "stopped": True}
    if done.returncode == -signal.SIGINT:
        # Ctrl-C reached both processes: the compiler did not crash.
        raise KeyboardInterrupt
    if done.returncode in (-signal.SIGKILL, -signal.SIGTERM):
        return {"why": "the compiler was killed", "stopped": True}
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if "failed" in x.lower()]
        said = lines[0].split("] ", 1)[-1][:200] if lines else ""
        return {"why": said} if said else None
    return json.loads(done.stdout.splitlines()[-1])
