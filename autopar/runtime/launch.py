"""Starting a build folder on this machine: torchrun, one clear word when a rank dies, Ctrl-C passed on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.runtime import report
from autopar.runtime.folder import BuildFolder
from autopar.runtime.world import VICTIM

PATIENCE = 300  # seconds that ranks get to save a checkpoint after SIGTERM or Ctrl-C


def run(folder: str | Path, resume: bool = False) -> int:
    """Train a build folder with as many ranks as its plan has devices; returns an exit status.

    0: trained to the last step. 2: the user's input was wrong, 1: a rank died (both said in one message on stderr).
    130: interrupted; the ranks have saved a checkpoint. Output of the ranks passes through.
    """
    read = BuildFolder.read(folder)
    script = read.path / "train.py"
    if not script.exists():
        raise AutoparError(f"{read.path}: no train.py there; compile the job again")
    (read.path / report.STATUS).unlink(missing_ok=True)
    ranks = read.plan.mesh.devices
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "failures.json"
        command = [sys.executable, "-m", "autopar.runtime.agent", str(note), "--standalone"]
        command += ["--nproc-per-node", str(ranks), "--shutdown-timeout", str(PATIENCE), "--log-dir", scratch]
        command += [str(script), *(["--resume"] if resume else [])]
        code, interrupted = _wait(subprocess.Popen(command, env=_environment(ranks), start_new_session=True))
        failures = json.loads(note.read_text()) if note.exists() else []
    return _verdict(read.path, code, interrupted, failures)


def _environment(ranks: int) -> dict[str, str]:
    """The cores shared out between the ranks, unless the user has said otherwise."""
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    return environment


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """Exit status, and whether Ctrl-C or SIGTERM came. The first lets the ranks save; the second ends them at once."""
    asked = 0

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        process.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), asked > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _verdict(folder: Path, code: int, interrupted: bool, failures: list[dict[str, Any]]) -> int:
    path = folder / report.STATUS
    found = json.loads(path.read_text()) if path.exists() else {"state": "not started"}
    if found["state"] == "done" and code == 0:
        return 0
    if interrupted or found["state"] == "interrupted":
        return 130
    if found["state"] == "failed":
        if found["rank"] != 0:  # rank 0 has printed its own
            print(f"autopar: rank {found['rank']}: {found['message']}", file=sys.stderr)
        return 2
    print(f"autopar: {_blame(failures, code)}; {_advice(folder)}", file=sys.stderr)
    return 1


def _blame(failures: list[dict[str, Any]], code: int) -> str:
    """Which rank died first, and how."""
    if not failures:
        return f"torchrun ended with status {code} before training did"
    killed = [f for f in failures if f["exitcode"] < 0 and f["exitcode"] not in (-signal.SIGTERM, -signal.SIGABRT)]
    raised = [f for f in failures if f["exitcode"] > 0 and f["exitcode"] != VICTIM]
    aborted = [f for f in failures if f["exitcode"] == -signal.SIGABRT]  # gloo may abort when its peer has gone
    first = min(killed or raised or aborted or failures, key=lambda f: f["timestamp"])
    if first["exitcode"] == VICTIM:
        return f"rank {first['rank']} lost its connection to another rank and all were stopped"
    if first["exitcode"] < 0:
        name = signal.Signals(-first["exitcode"]).name
        return f"rank {first['rank']} was killed by {name} and the other ranks were stopped"
    last = (first["message"].strip().splitlines() or ["no message"])[-1]
    return f"rank {first['rank']} failed ({last}) and the other ranks were stopped"


def _advice(folder: Path) -> str:
    latest = folder / "checkpoints" / "latest"
    if latest.exists():
        return f"`autopar run {folder} --resume` goes on from {latest.read_text().strip()}"
    return "there is no checkpoint yet, so it has to start again"
