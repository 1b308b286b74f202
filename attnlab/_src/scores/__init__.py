"""What similarity is: pure functions of a query and a key, with their parameters."""
