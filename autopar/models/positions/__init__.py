"""Positions: each file's ``make(spec)`` is a `Positions` (see `base`)."""
