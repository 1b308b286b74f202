"""The private modules; the public ones lie one folder up."""
