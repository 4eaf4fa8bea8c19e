"""Carrying a plan out: materialize, ZeRO, pipelines, the training loop, checkpoints, launch."""
