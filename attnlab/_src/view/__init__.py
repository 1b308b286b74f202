"""Pages to look at: masks and plans that one can zoom into, without a server."""
