"""How a gradient becomes an update: one rule a file."""
