"""Decoders built from a spec, and every other source a job can take its model from."""
