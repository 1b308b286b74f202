"""One way each to compute the same mathematics."""

from attnlab.implementations.jax_nn import JaxNn
from attnlab.implementations.native import Native
from attnlab.implementations.reference import Reference
from attnlab.implementations.tiled import Tiled
from attnlab.types import Implementation

#: By name, in the order in which the automatic choice asks them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "native": Native(),
    "tiled": Tiled(),
    "jax_nn": JaxNn(),
    "reference": Reference(),
}
