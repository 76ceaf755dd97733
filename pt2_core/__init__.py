"""The ground floor that all packages stand on; importing it loads no torch."""
