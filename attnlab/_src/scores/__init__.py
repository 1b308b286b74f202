"""Scores: similarities of a query and a key, as pure functions with parameters."""
