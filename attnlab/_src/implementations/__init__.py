"""One way each to compute the same mathematics."""

from attnlab._src.implementations.jax_nn import JaxNn
from attnlab._src.implementations.native import Native
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.reference import Reference
from attnlab._src.implementations.splash import Splash
from attnlab._src.implementations.tiled import Tiled
from attnlab._src.types import Implementation

#: By name, in the order in which ``explain`` lists them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "native": Native(),
    "pallas_tpu": PallasTpu(),
    "tiled": Tiled(),
    "splash": Splash(),
    "jax_nn": JaxNn(),
    "reference": Reference(),
}
#: What the automatic choice may take, the greatest first; ``tiled`` takes everything,
#: everywhere. The others hold ``[T, S]`` in memory: they run only when asked for.
PRIORITIES: dict[str, float] = {"native": 20, "pallas_tpu": 10, "tiled": 0}
#: Those that come with attnlab.
BUILT_IN = frozenset(IMPLEMENTATIONS)


def automatic() -> list[str]:
    """The names among which the automatic choice takes the first that can."""
    return sorted(PRIORITIES, key=lambda name: PRIORITIES[name], reverse=True)
