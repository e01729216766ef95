"""How the parts of a transformer are written for each kind of runtime."""
