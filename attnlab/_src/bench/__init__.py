"""Measuring: what attention costs on the machine at hand, once it is right."""
