"""Weights of published checkpoints, put into modules by a map of names."""
