"""Which blocks of keys, or which keys, each query should see."""
