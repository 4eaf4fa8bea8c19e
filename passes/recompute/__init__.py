"""Passes that say what may be computed again in the backward pass."""
