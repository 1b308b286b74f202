"""The stub through XLA, until there is a kernel: calls at once, several devices."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attnlab.implementations.native import load

pytestmark = pytest.mark.skipif("load.why_not()", reason="the library is not there")


def copy(query):
    shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
    return jax.ffi.ffi_call(load.FORWARD, shape)(query)


@pytest.mark.parametrize("shape", [(0,), (3,), (1000, 1001)])
def test_it_copies(shape):
    query = np.random.default_rng(0).normal(size=shape).astype("float32")
    np.testing.assert_array_equal(jax.jit(copy)(query), query)


def test_many_calls_at_once():
    query = jnp.arange(100_000.0)
    call = jax.jit(copy)
    with ThreadPoolExecutor(8) as pool:
        for i, output in enumerate(pool.map(lambda i: call(query + i), range(100))):
            np.testing.assert_array_equal(output, query + i)


def test_several_devices():
    query = np.arange(4 * 50_000.0).reshape(4, -1)
    mesh = Mesh(np.array(jax.devices()[:4]), "x")
    spec = PartitionSpec("x")
    call = jax.shard_map(copy, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(call)(query), query)
    np.testing.assert_array_equal(jax.pmap(copy)(query), query)
