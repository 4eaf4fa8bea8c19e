"""Planning from the shell: seconds from start to JSON and the peak memory of `autopar plan JOB --json`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml
from _measure import options

PASSES = [{"mixed_precision": {"compute": "bfloat16"}}, {"flash_attention": {}}]
JOBS = {
    "llama-3-8b on 8 H100": ("llama-3-8b", 1, 64, 15.0),
    "llama-3-70b on 64 H100": ("llama-3-70b", 8, 512, 30.0),
}
"""Name → model, hosts of 8, sequences of 8,192 tokens a step, and the seconds it may take."""
MEMORY = 2e9


class Planned(NamedTuple):
    seconds: float
    peak_bytes: int
    summary: str


def planned(model: str, hosts: int, sequences: int) -> Planned:
    """One run of the command. Raises RuntimeError with its message where it fails."""
    job = {"model": model, "cluster": {"name": "dgx-h100", "hosts": hosts}, "passes": PASSES,
           "batch": {"sequences": sequences, "length": 8192}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "job.yaml", Path(folder) / "plan.json"
        file.write_text(yaml.safe_dump(job))
        command = [str(Path(sys.executable).with_name("autopar")), "plan", str(file), "--json"]
        with out.open("wb") as stdout:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)
            assert process.stderr is not None
            error = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)  # the peak of this process and of what it started
            seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"{' '.join(command)}: {error.decode().strip()}")
        plan = json.loads(out.read_text())
    mesh, found = plan["plan"]["mesh"], plan["plan"]
    text = " ".join(f"{a}{n}" for a, n in mesh.items() if n > 1)
    return Planned(seconds, usage.ru_maxrss * 1024, f"{text} zero{found['zero']}, gap {plan['search']['gap']:.1%}")


def main() -> int:
    given = options(__doc__, rounds=3)
    missed = False
    print("| what | seconds (all runs) | target | peak memory | target | plan | |\n|---|---|---|---|---|---|---|")
    for name, (model, hosts, sequences, target) in JOBS.items():
        runs = [planned(model, hosts, sequences) for _ in range(given.rounds)]
        seconds = sorted(r.seconds for r in runs)
        median, peak = statistics.median(seconds), max(r.peak_bytes for r in runs)
        miss = median > target or peak > MEMORY
        missed |= miss
        every = ", ".join(f"{s:.1f}" for s in seconds)
        cells = [name, f"{median:.1f} ({every})", f"≤ {target:g}", f"{peak / 1e9:.2f} GB", f"≤ {MEMORY / 1e9:g} GB"]
        print("| " + " | ".join([*cells, runs[0].summary, "missed" if miss else "met"]) + " |", flush=True)
    return int(given.check and missed)


if __name__ == "__main__":
    sys.exit(main())
