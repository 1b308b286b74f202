"""Modifiers: changes of the logits, in the order given, before the mask."""
