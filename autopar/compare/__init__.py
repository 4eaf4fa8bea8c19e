"""Architectures side by side, read off their traced graphs."""
