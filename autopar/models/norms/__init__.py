"""Norms over the last dim: each file's ``make(size, spec)`` is a module."""
