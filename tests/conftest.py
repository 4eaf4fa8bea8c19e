"""Before anything imports Triton: its kernels can be interpreted, on any machine (tests/kernels)."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
