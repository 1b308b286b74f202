"""The attention functions: validation, dispatch, derivatives, and their cost."""
