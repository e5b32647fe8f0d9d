"""Matrix products: symmetric, of quantised operands, and of weights that are kept in few bits."""
