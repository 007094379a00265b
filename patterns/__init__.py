"""Patterns as data, and the named patterns of the compiler."""
