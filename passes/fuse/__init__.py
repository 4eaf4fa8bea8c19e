"""Passes that put one kernel in the place of several operators."""
