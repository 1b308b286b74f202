"""Attention whose queries and keys are sharded along their length."""
