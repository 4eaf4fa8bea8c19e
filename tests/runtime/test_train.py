"""Whole runs through torchrun: metrics, summary, a rank that dies, resuming, stopping, wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from handmade import plan_of, reference, write
from safetensors.torch import save_file

from autopar.runtime import launch
from autopar.runtime.manifest import Manifest

PLAN = plan_of(pp=1, dp=2, zero=2, microbatches=2)
JOB = """
optimizer: {lr: 0.01, state: float64, schedule: cosine, warmup: 2}
train: {steps: 6, clip: 1.0, seed: 3, checkpoint_every: 2}
"""
TRAIN = '''"""Trains this folder; can be told to let a rank die or to be slow."""
import os, signal, time
from pathlib import Path
from autopar.errors import AutoparError
from autopar.runtime.engine import Engine
from autopar.runtime.train import main

step = Engine.step
first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

def told(self, batch):
    if os.environ.get("DIE") == f"{os.environ['RANK']}/{self.optimizer.updates}" and first_attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("RAISE") == f"{os.environ['RANK']}/{self.optimizer.updates}":
        raise ValueError("told to")
    if os.environ.get("WRONG") == f"{os.environ['RANK']}/{self.optimizer.updates}":
        raise AutoparError("told to be wrong")
    time.sleep(float(os.environ.get("SLOW", 0)))
    return step(self, batch)

Engine.step = told
main(Path(__file__).parent)
'''


def build(folder: Path, job: str = JOB, weights: bool = True) -> Path:
    write(folder, PLAN, job=job)
    (folder / "train.py").write_text(TRAIN)
    model = reference()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "weights.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"] = [{"files": "weights.safetensors"}] if weights else []
    manifest["inputs"]["input_ids"]["high"] = manifest["inputs"]["labels"]["high"] = 13
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run from beginning to end."""
    folder = build(tmp_path_factory.mktemp("whole") / "build")
    assert launch.run(folder) == 0
    return folder


def test_a_run_leaves_metrics_summary_and_checkpoints(whole):
    lines = metrics(whole)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    parts = {"data_seconds", "passes_seconds", "update_seconds"}
    assert set(lines[0]) == {"step", "loss", "tokens_per_second", "step_seconds", "peak_bytes"} | parts
    assert sum(lines[1][part] for part in parts) == pytest.approx(lines[1]["step_seconds"])
    assert lines[0]["peak_bytes"] > 3 * 8 * sum(p.numel() for p in reference().parameters()) // 2  # sharded over 2
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["measured"]["step_seconds"] > 0
    assert len(summary["measured"]["peak_bytes_by_rank"]) == 2
    assert (whole / "checkpoints" / "latest").read_text() == "step-6"
    tokens = Manifest.read(whole).tokens(PLAN)
    assert lines[2]["tokens_per_second"] == pytest.approx(tokens / lines[2]["step_seconds"])


def test_after_a_rank_was_killed_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    whole, tmp_path, monkeypatch, capfd
):
    folder = build(tmp_path / "build")
    monkeypatch.setenv("DIE", "1/3")
    begin = time.monotonic()
    assert launch.run(folder) == 1
    assert time.monotonic() - begin < 30
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("autopar: rank 1 was killed by SIGKILL") and "--resume" in message and "step-2" in message
    monkeypatch.delenv("DIE")
    code = launch.run(folder, resume=True)
    assert code == 0, capfd.readouterr().err
    assert losses(folder) == losses(whole)


def test_a_rank_that_raises_is_the_one_that_is_named(tmp_path, monkeypatch, capfd):
    folder = build(tmp_path / "build")
    monkeypatch.setenv("RAISE", "1/1")
    assert launch.run(folder) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("autopar: rank 1 failed (ValueError: told to)") and "no checkpoint yet" in message


def test_of_a_rank_that_raised_and_one_that_aborted_with_it_the_first_is_named():
    aborted = {"rank": 0, "exitcode": -signal.SIGABRT, "message": "", "timestamp": 1}
    raised = {"rank": 1, "exitcode": 1, "message": "ValueError: told to", "timestamp": 2}
    assert launch._blame([aborted, raised], 1).startswith("rank 1 failed (ValueError: told to)")
    assert launch._blame([aborted], 1).startswith("rank 0 was killed by SIGABRT")


def test_input_that_only_one_rank_finds_wrong_is_reported_too(tmp_path, monkeypatch, capfd):
    folder = build(tmp_path / "build")
    monkeypatch.setenv("WRONG", "1/1")
    assert launch.run(folder) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1] == "autopar: rank 1: told to be wrong"


def test_ctrl_c_saves_stops_with_130_and_resumes(whole, tmp_path):
    folder = build(tmp_path / "build")
    code = f"from autopar.runtime.launch import run; raise SystemExit(run({str(folder)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "SLOW": "0.5"})
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (folder / "metrics.jsonl").exists() and metrics(folder):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    done = len(metrics(folder))
    assert 1 <= done < 6
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{done}"
    assert launch.run(folder, resume=True) == 0
    assert losses(folder) == losses(whole)


def test_wrong_input_ends_with_status_2_and_one_message(tmp_path, capfd):
    folder = build(tmp_path / "build")
    state = {n: t.contiguous() for n, t in reference().state_dict().items()}
    state["blocks.0.up.weight"] = torch.zeros(3, 3, dtype=torch.float64)
    state["other"] = state.pop("head.weight")
    save_file(state, folder / "weights.safetensors")
    assert launch.run(folder) == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.strip()]
    assert len(lines) == 1, lines
    assert "missing: head.weight" in lines[0] and "unknown to the model: other" in lines[0]
    assert "blocks.0.up.weight is 3 × 3, the model needs 12 × 10" in lines[0]


def test_torchrun_alone_restarts_after_a_death_and_ends_with_the_same_losses(whole, tmp_path):
    """``torchrun --max-restarts`` with gloo: the second attempt must not read the addresses of the first."""
    folder = build(tmp_path / "build")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(folder / "train.py"), "--resume"]
    done = subprocess.run(command, env={**os.environ, "DIE": "0/3"}, timeout=90, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(folder) == losses(whole)
