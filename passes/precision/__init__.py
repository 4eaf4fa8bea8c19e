"""Passes that choose dtypes."""
