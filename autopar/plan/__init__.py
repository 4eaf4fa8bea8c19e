"""The decision, as data."""
