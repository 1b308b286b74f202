"""Attention on several devices."""

from attnlab._src.sharding import use as use

__all__ = ["use"]
