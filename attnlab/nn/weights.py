"""Weights of Hugging Face checkpoints, put into modules by a map of names.

A map says for each parameter, by its path in the module (``query.kernel``), which
tensors it is made of and how. One map serves every variant of a family: what the module
does not have (biases, projections of anchors, a head) the map is not asked for, and a
tensor that then belongs nowhere is an error. What a family is known to carry for
nothing is ignored, with a warning that names it; what is stored twice is compared.

Shapes cannot tell how many heads there are, nor epsilons, activations, scales or masks:
those the module must have been given as the checkpoint's ``config.json`` says.
"""

from attnlab._src.nn.weights.families import bert as bert
from attnlab._src.nn.weights.families import gpt2 as gpt2
from attnlab._src.nn.weights.families import marian as marian
from attnlab._src.nn.weights.families import mistral as mistral
from attnlab._src.nn.weights.families import t5 as t5
from attnlab._src.nn.weights.loading import empty as empty
from attnlab._src.nn.weights.loading import load as load
from attnlab._src.nn.weights.recipes import Names as Names
from attnlab._src.nn.weights.recipes import Recipe as Recipe
from attnlab._src.nn.weights.recipes import conv1d as conv1d
from attnlab._src.nn.weights.recipes import flat as flat
from attnlab._src.nn.weights.recipes import linear as linear
from attnlab._src.nn.weights.recipes import part as part
from attnlab._src.nn.weights.recipes import stacked as stacked
from attnlab._src.nn.weights.recipes import tensor as tensor

__all__ = [
    "Names",
    "Recipe",
    "bert",
    "conv1d",
    "empty",
    "flat",
    "gpt2",
    "linear",
    "load",
    "marian",
    "mistral",
    "part",
    "stacked",
    "t5",
    "tensor",
]
