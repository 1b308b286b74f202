"""Attention on several devices."""

from attnlab._src.placement import use as use

__all__ = ["use"]
