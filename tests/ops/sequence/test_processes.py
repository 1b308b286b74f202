"""Two processes over loopback compute what one does."""

import os
import socket
import subprocess
import sys

import pytest

#: Arguments: number of the process, port, strategy.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

number, port, strategy = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
from attnlab import attention, masks, sharding

mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,))
assert len(jax.local_devices()) == 2 and mesh.size == 4
arrays = [
    np.asarray(jax.random.normal(key, (2, 32, 4, 8)))
    for key in jax.random.split(jax.random.key(0), 3)
]
mask = masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(2))
options = dict(mask=mask, dropout_rate=0.2, dropout_rng=jax.random.key(1))

def both_passes(attend):
    def run(q, k, v):
        output, pull = jax.vjp(lambda *x: attend(*x, **options), q, k, v)
        return output, *pull(jnp.sin(output))
    return jax.jit(run)

def sharded(q, k, v, **options):
    return sharding.attention(
        q, k, v, mesh=mesh, sequence="s", strategy=strategy, **options
    )

place = NamedSharding(mesh, P(None, "s"))
given = [
    jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]) for x in arrays
]
found, wanted = both_passes(sharded)(*given), both_passes(attention)(*arrays)
for one, other in zip(found, wanted):
    assert not one.is_fully_addressable
    for shard in one.addressable_shards:
        np.testing.assert_allclose(
            shard.data, np.asarray(other)[shard.index], rtol=1e-4, atol=2e-5
        )
print("equal")
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["exchange", "ring"])
def test_two_processes(strategy):
    port = str(free_port())
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), port, strategy],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [text.strip().splitlines()[-1:] for text in said] == [["equal"]] * 2, said
