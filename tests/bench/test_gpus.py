"""What the compilers of NVIDIA's GPUs report, without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from attnlab import attention
from attnlab._src.bench import gpus
from attnlab._src.bench.gpus import CARDS, Loop, gpu_study
from attnlab._src.bench.targets import CompilerMissing
from attnlab._src.implementations.pallas_gpu import blocks
from attnlab._src.implementations.pallas_gpu.blocks import Blocks
from benchmarks import gpu_baseline
from tests.conftest import forget

needs_compiler = pytest.mark.skipif(
    not all(gpus.parts().values()), reason="NVIDIA's assembler is not installed"
)
X = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)

#: Two loops with products. The first waits for a barrier in code behind the second,
#: which jumps back into it.
CODE = """
.text.kernel:
   -:-:-:Y:01        /*0000*/                   MOV R1, c[0x0][0x28]
.L_x_1:
   -:-:-:Y:05        /*0010*/              @!P0 BRA `(.L_x_9)
.L_x_2:
   -:-:-:-:12        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]
   1:-:-:Y:04        /*0030*/                   MUFU.EX2 R2, R3
   -:-:-:Y:05        /*0040*/               @P1 BRA `(.L_x_1)
.L_x_3:
 2&1:-:-:Y:03        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]
   -:-:-:Y:02        /*0060*/              @!P1 BRA `(.L_x_3)
   -:-:-:Y:02        /*0070*/                   EXIT
.L_x_9:
   -:-:-:Y:07        /*0080*/                   NOP
   -:-:-:Y:05        /*0090*/                   BRA `(.L_x_2)
"""


def test_loops_of_the_code():
    counts, loops = gpus.read_code(CODE)
    assert counts == {
        "all": 10,
        "tensor core": 2,
        "bulk copy": 0,
        "exponential": 1,
        "branch": 4,
    }
    assert [Loop(**x) for x in loops] == [Loop(4, 1, 26), Loop(2, 1, 5)]


def test_an_unknown_target():
    with pytest.raises(ValueError, match="target: expected one of gpu:a100.*'gpu:x'"):
        gpu_study(lambda x: x, X, target="gpu:x")


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(gpus, "parts", lambda: {"ptxas": None})
    with pytest.raises(CompilerMissing, match=r"ptxas not found.*gpu-aot"):
        gpu_study(lambda x: x, X, target="gpu:h100")


def test_what_counts_as_worse():
    before = {"k": {"spills": 0, "stalls": [100, 200]}}

    def faults(spills, *stalls):
        now = {"k": {"spills": spills, "stalls": list(stalls)}}
        return list(gpu_baseline.faults("x", now, before))

    assert faults(0, 100, 209) == []
    assert faults(0, 100, 210) == [
        "x: stall counts of k are [100, 210], and were [100, 200]"
    ]
    assert faults(0, 100)
    assert faults(8, 100, 200) == ["x: k spills 8 bytes of a thread"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cards")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", CARDS)
def test_any_function_compiles(target, cache):
    found = gpu_study(lambda x: jnp.tanh(x) @ x.mT, X, target=target, cache=cache)
    assert found.why is None
    assert found.kernels == ()
    assert found.temporary >= 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("head_size", gpu_baseline.HEAD_SIZES)
@pytest.mark.parametrize("of", gpu_baseline.PASSES)
def test_kernels_compile_as_well_as_they_did(head_size, of, cache):
    held = gpu_baseline.json.loads(gpu_baseline.FILE.read_text())
    before = held.get(gpu_baseline.compilers(), {})
    name = f"{of} causal {head_size}"
    now = gpu_baseline.ours(head_size, "causal", of, cache)
    assert list(gpu_baseline.faults(name, now, before.get(name))) == []


@pytest.mark.slow
@needs_compiler
def test_spills_are_noticed(cache, monkeypatch):
    forget()  # programs with other block sizes
    monkeypatch.setitem(blocks.BLOCKS, ("key", 128), Blocks(2, 64, 2))
    now = gpu_baseline.ours(128, "causal", "backward", cache)
    forget()
    (fault,) = gpu_baseline.faults("x", now, None)
    assert "attnlab_backward_key spills" in fault


@pytest.mark.slow
@needs_compiler
def test_a_card_without_kernels_says_so(cache):
    spec = gpu_baseline.Spec(dtype="bfloat16", length=256, heads=1, key_heads=1)
    row = gpu_baseline.gpu_row(spec, "forward", "gpu:a100", cache)
    assert row.why == "no kernels for compute capability 8.0"
    assert row.implementation == "batched"


@pytest.mark.slow
@needs_compiler
def test_a_kernel_that_cannot_be_compiled_gives_its_reason(cache):
    """The kernels need an H100: on another card the compiler fails."""

    def attend(x):
        return attention(x, x, x, implementation="pallas_gpu")

    with jax.default_matmul_precision("default"):
        found = gpu_study(attend, X, target="gpu:a100", cache=cache)
    assert found.kernels == ()
    assert found.why
