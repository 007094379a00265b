"""Operators: each file holds one op with its meaning, its packing and its implementations."""
