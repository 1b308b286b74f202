"""The TPU kernels where no TPU is: interpreted, in blocks so small that many exist."""

import sys

from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.pallas_tpu.blocks import Blocks

NAME = "pallas_tpu_interpreted"


class Interpreted(PallasTpu):
    """The same kernels, on any platform."""

    name = NAME
    platforms = None
    interpret = True
    lanes = 32
    blocks = Blocks(64, 64, 32)


def register(monkeypatch, made=None):
    """Lets ``implementation=NAME`` find it."""
    monkeypatch.setitem(IMPLEMENTATIONS, NAME, made or Interpreted())


def one_row_segments(monkeypatch):
    """As if memory held the gradients of one block of queries only."""
    module = sys.modules["attnlab._src.implementations.pallas_tpu.memory"]
    monkeypatch.setattr(module, "SEGMENT", 2**40)
