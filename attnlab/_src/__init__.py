"""The private engine; what is public lies one folder up."""
