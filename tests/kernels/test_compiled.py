"""Every kernel compiled for A100 and H100 (sm_80, sm_90), without a GPU: nothing spills, shared memory suffices, products run
on tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import KernelError
from autopar.kernels import report
from autopar.kernels.device.common import SHARED_MEMORY

PRODUCTS = ("attention", "loss", "pages")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: in this one kernels are interpreted."""
    script = Path(__file__).with_name("compile_all.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_all_kernels_are_there_for_both_devices(compiled: list[dict[str, Any]]) -> None:
    assert {c["capability"] for c in compiled} == {80, 90}
    names = {c["name"] for c in compiled}
    assert names == {
        "forward", "of_queries", "of_keys", "normalize", "gradients", "gate_rows", "gradient_rows", "sums", "turn_rows",
        "attend_pages", "update",
    }  # fmt: skip


def test_no_register_spills(compiled: list[dict[str, Any]]) -> None:
    assert not [c for c in compiled if c["spilled"]]


def test_shared_memory_is_within_the_devices(compiled: list[dict[str, Any]]) -> None:
    assert not [c for c in compiled if c["shared"] > SHARED_MEMORY[c["capability"]]]


def test_matrix_products_run_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    products = [c for c in compiled if c["call"].startswith(PRODUCTS)]
    assert products and not [c for c in products if not c["tensor_cores"]]
    hopper = [c for c in products if c["capability"] == 90 and c["call"].startswith("attention")]
    assert hopper and not [c for c in hopper if "wgmma.mma_async" not in c["tensor_cores"]]
    assert not [c for c in compiled if c["tensor_cores"] and not c["call"].startswith(PRODUCTS)]


def test_kernels_that_are_interpreted_are_not_compiled() -> None:
    with pytest.raises(KernelError, match="unset TRITON_INTERPRET"):
        report.launches(lambda: None)
