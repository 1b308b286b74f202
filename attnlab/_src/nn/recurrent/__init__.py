"""Recurrent sequence-to-sequence models, and the attention that they look back with."""
