"""Ops that ranks compute together: sums with the norm after them, and the exchange of tokens with experts."""
