"""The ground floor: what every part of the project shares. It imports neither torch nor NumPy."""
