"""Program and plan → readable PyTorch, one SPMD module per stage."""
