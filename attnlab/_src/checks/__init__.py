"""``check``: tests whether a user's class keeps the laws of its protocol."""
