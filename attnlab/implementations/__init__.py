"""One way each to compute the same mathematics."""

from attnlab.implementations.jax_nn import JaxNn
from attnlab.implementations.native import Native
from attnlab.implementations.pallas_tpu import PallasTpu
from attnlab.implementations.reference import Reference
from attnlab.implementations.splash import Splash
from attnlab.implementations.tiled import Tiled
from attnlab.types import Implementation

#: By name, in the order in which ``explain`` lists them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "native": Native(),
    "pallas_tpu": PallasTpu(),
    "tiled": Tiled(),
    "splash": Splash(),
    "jax_nn": JaxNn(),
    "reference": Reference(),
}
