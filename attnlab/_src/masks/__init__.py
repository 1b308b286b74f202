"""Masks: which query may attend to which key, how masks combine, and their plans."""
