"""What a program costs on a TPU that is not here: the TPU's own compiler says.

The compiler (``pip install "attnlab[tpu-aot]"``) runs on any Linux machine. It tells
its static schedule: cycles, the slots of each instruction, spills, memory. These are
estimates by the compiler: compare them with each other; they are no times.

The flags that make it talk are undocumented, and it may crash on them; so each program
is compiled by a process of its own, and a crash means "no figure", never a pass.
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

from attnlab._src.bench.files import cache_folder, write_atomically


@dataclasses.dataclass(frozen=True)
class Target:
    """A generation of TPUs.

    Attributes:
        topology: the smallest that the compiler knows.
        accelerator: what its environment is told.
        device_kind: as JAX names a device.
        cores: that one device has.
        multiplies: multiplications and additions of a core's matrix units in a cycle.
        elementwise: numbers that a core's function unit takes in a cycle.
    """

    topology: str
    accelerator: str
    device_kind: str
    cores: int
    multiplies: int
    elementwise: int = 1024


#: By the name that ``target=`` takes.
TARGETS = {
    "tpu:v4": Target("v4:2x2x1", "v4-8", "TPU v4", 2, 65_536),
    "tpu:v5e": Target("v5e:2x2", "v5litepod-4", "TPU v5 lite", 1, 65_536),
    "tpu:v5p": Target("v5p:2x2x1", "v5p-8", "TPU v5", 2, 65_536),
    "tpu:v6e": Target("v6e:2x2", "v6e-4", "TPU v6 lite", 1, 262_144),
    "tpu:tpu7x": Target("tpu7x:2x2x1", "tpu7x-8", "TPU7x", 1, 262_144),
}

#: Of which the compiler tells the cycles of our kernels.
TOLD = ("tpu:v5e", "tpu:v5p", "tpu:v6e")

#: What the compiler counts in each bundle of instructions.
SLOTS = (
    "MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE",
    "VSTORE:SPILL", "SALU",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program: one of Pallas, or a fusion of XLA's.

    Attributes:
        name: of the kernel.
        cycles: the static estimate, memory transfers included; None: not told.
        memory: bytes of vector memory; None: not told.
        bundles: instruction words of its schedule, each loop's body once.
        slots: for each name of ``SLOTS``, the fraction in use.
        fills: registers filled from memory that had to be spilled there, in the code.
        spills: registers spilled, in the code.
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
    """A compiled program.

    Attributes:
        target: a name of ``TARGETS``.
        kernels: those with a name that says whose they are, in order of their names.
        temporary: bytes of memory beside arguments and results.
        arguments: bytes of the arguments.
        results: bytes of the results.
        why: None; or why there is nothing, or no cycles.
    """

    target: str
    kernels: tuple[Kernel, ...] = ()
    temporary: int = 0
    arguments: int = 0
    results: int = 0
    why: str | None = None

    @property
    def cycles(self) -> int | None:
        """Of all kernels together, each once; None: not told."""
        found = [k.cycles for k in self.kernels if k.cycles is not None]
        return sum(found) if found else None

    def kernel(self, start: str) -> Kernel | None:
        """The kernel whose name starts so."""
        return next((k for k in self.kernels if k.name.startswith(start)), None)


class CompilerMissing(RuntimeError):
    """The TPU compiler is not installed."""


def on(target: str) -> jax.sharding.use_abstract_mesh:
    """Within this, programs are traced and lowered for a target that need not be here.

    Args:
        target: a name of ``TARGETS``.
    """
    known = TARGETS[target]
    device = jax.sharding.AbstractDevice(known.device_kind, known.cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(
    fn: Callable[..., Any], shapes: Sequence[Any], target: str
) -> jax.export.Exported:
    """A program for a target, which another process can read.

    Args:
        fn: a function of pytrees of arrays.
        shapes: its arguments, with ``jax.ShapeDtypeStruct``s for arrays.
        target: a name of ``TARGETS``.

    Returns:
        A function from leaves to leaves: that process may not know the pytrees' types.
    """
    with on(target):
        made = jax.export.export(jax.jit(fn), platforms=("tpu",))(*shapes)
    return dataclasses.replace(
        made,
        in_tree=jax.tree.structure((tuple(made.in_avals), {})),
        out_tree=jax.tree.structure(tuple(made.out_avals)),
    )


def study(
    fn: Callable[..., Any],
    *shapes: Any,
    target: str,
    timeout: float = 1800.0,
    cache: Path | None = None,
) -> Study:
    """Compiles a function for a TPU that need not be here.

    Args:
        fn: a function of pytrees of arrays; jitted here.
        *shapes: its arguments, with ``jax.ShapeDtypeStruct``s for arrays.
        target: a name of ``TARGETS``.
        timeout: seconds that the compiler gets.
        cache: folder of earlier answers; the user's own if not given.

    Raises:
        ValueError: if there is no such target.
        CompilerMissing: if libtpu is not installed.

    Returns:
        What the compiler tells; ``why`` says what it could not tell.
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
        # The profile is what most often fails: do without.
        reason = "the compiler crashed" if found is None else found["why"]
        stopped = found is not None and found.get("stopped", False)
        found = _compile(program, target, timeout, profile=False)
        if found is None:
            return Study(target, why=reason)
        found.setdefault("why", f"no cycles: {reason}")
        found["stopped"] = stopped or found.get("stopped", False)
    # Whom the clock or the system stopped may have an answer another time.
    final = not found.pop("stopped", False)
    content = {"target": target, **found}
    made = read(content)
    if made.kernels and final:
        write_atomically(path, json.dumps(content, indent=1).encode())
    return made


def read(content: dict[str, Any]) -> Study:
    """What a process wrote."""
    rest = dict(content)
    kernels = tuple(Kernel(**k) for k in rest.pop("kernels", ()))
    return Study(kernels=kernels, **rest)


def _identity(program: str, target: str) -> str:
    """Of all that decides the answer: where the program was written does not."""
    bare = re.sub(r"^#loc.*\n?| loc\((#loc\d*|\"[^\"]*\")\)", "", program, flags=re.M)
    said = hashlib.sha256(bare.encode())
    said.update(f"{target} {version('jaxlib')} {version('libtpu')} 3".encode())
    return said.hexdigest()[:32]


def _compile(
    program: jax.export.Exported, target: str, timeout: float, *, profile: bool
) -> dict[str, Any] | None:
    """Asks a process; None where it crashes."""
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
        # Flags of the caller's would change the answer.
        kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment = {
            **kept,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": known.accelerator,
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": " ".join(flags),
        }
        command = [sys.executable, "-m", "attnlab._src.bench.deviceless"]
        command += [known.topology, str(source), str(dumps)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            why = f"the compiler took more than {timeout:.0f} s"
            return {"why": why, "stopped": True}
        if done.returncode == -signal.SIGINT:
            # Both were told to stop: the compiler has no answer, and did not crash.
            raise KeyboardInterrupt
        if done.returncode in (-signal.SIGKILL, -signal.SIGTERM):
            return {"why": "the compiler was killed", "stopped": True}
        if done.returncode:
            lines = [x for x in done.stderr.splitlines() if "failed" in x.lower()]
            said = lines[0].split("] ", 1)[-1][:200] if lines else ""
            return {"why": said} if said else None
        return json.loads(done.stdout.splitlines()[-1])
