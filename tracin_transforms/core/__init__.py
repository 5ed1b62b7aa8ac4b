"""The method: NumPy only; every formula lives here once."""
