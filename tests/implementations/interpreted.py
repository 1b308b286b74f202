"""The TPU kernels in interpret mode, with blocks so small that inputs have many."""

import sys

from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, Entry

NAME = "pallas_tpu_interpreted"


class Interpreted(PallasTpu):
    """The TPU kernels, interpreted on any platform."""

    name = NAME
    platforms = None
    interpret = True
    lanes = 32
    table = (Entry(Blocks(64, 64, 32)),)


def register(monkeypatch, made=None):
    """Registers ``Interpreted`` as ``implementation=NAME`` for one test."""
    monkeypatch.setitem(IMPLEMENTATIONS, NAME, made or Interpreted())


def short_slices(monkeypatch):
    """Divides the backward pass: a kernel for each block of queries."""
    module = sys.modules["attnlab._src.implementations.pallas_tpu"]

    def slices_of(inputs, blocks, limit):
        length = inputs.sizes.T
        firsts = range(0, length, blocks.q)
        return [slice(n, min(n + blocks.q, length)) for n in firsts]

    monkeypatch.setattr(module, "slices_of", slices_of)


def one_row_segments(monkeypatch):
    """Limits a segment of the backward pass to one block of queries."""
    module = sys.modules["attnlab._src.implementations.pallas_tpu.memory"]
    monkeypatch.setattr(module, "SEGMENT", 2**40)
