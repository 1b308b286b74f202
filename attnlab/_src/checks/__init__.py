"""The laws, as a library function: they hold a user's own class to them."""
