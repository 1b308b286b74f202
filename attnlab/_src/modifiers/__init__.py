"""What is done to the logits, in the order given, before the mask."""
