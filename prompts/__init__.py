"""Templates as data."""
