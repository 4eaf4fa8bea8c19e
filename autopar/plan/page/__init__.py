"""The parts of a plan's HTML page: one file, one section."""
