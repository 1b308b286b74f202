"""The verbs, their validation and dispatch, and what they will cost."""
