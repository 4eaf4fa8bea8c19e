"""The numbered examples run as they are (the first one needs pretrained weights: `make demo` runs it)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parent.parent.glob("examples/0*.py"))


def command(example: Path) -> list[str]:
    if "torchrun" in example.name:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    tiny = ["--tiny"] if example.name == "07_prefix_lm.py" else []  # else it needs pretrained weights
    return [sys.executable, str(example), *tiny]


@pytest.mark.parametrize("example", EXAMPLES[1:], ids=lambda p: p.stem)
def test_the_example_runs(example: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(example), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_example_is_short() -> None:
    assert [p.name for p in EXAMPLES if len(p.read_text().splitlines()) > 80] == []
