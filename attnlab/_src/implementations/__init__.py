"""Implementations: different ways to compute the same attention."""

from attnlab._src.implementations.batched import Batched
from attnlab._src.implementations.jax_nn import JaxNn
from attnlab._src.implementations.native import Native
from attnlab._src.implementations.pallas_gpu import PallasGpu
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.reference import Reference
from attnlab._src.implementations.splash import Splash
from attnlab._src.implementations.tiled import Tiled
from attnlab._src.types import Implementation

#: All implementations by name, in the order in which ``explain`` lists them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "native": Native(),
    "pallas_tpu": PallasTpu(),
    "pallas_gpu": PallasGpu(),
    "batched": Batched(),
    "tiled": Tiled(),
    "splash": Splash(),
    "jax_nn": JaxNn(),
    "reference": Reference(),
}
#: Candidates of the automatic choice, with the greatest number tried first; ``tiled``
#: supports all inputs on all platforms. All others run only when asked for by name, and
#: say why in ``why_not_automatic``.
PRIORITIES: dict[str, float] = {
    "native": 20,
    "pallas_tpu": 10,
    "batched": 5,
    "tiled": 0,
}
#: Names of the implementations that come with attnlab.
BUILT_IN = frozenset(IMPLEMENTATIONS)


def automatic() -> list[str]:
    """The candidates of the automatic choice, which takes the first capable one."""
    return sorted(PRIORITIES, key=lambda name: PRIORITIES[name], reverse=True)
