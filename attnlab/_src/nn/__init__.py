"""Flax (NNX) modules, thin over the pure functions."""
