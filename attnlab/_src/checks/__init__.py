"""``check``: tests whether a class of the user's keeps the laws of its protocol."""
