"""Predicted against measured on two emulated hosts of two processes each, as the link between them changes.

The hosts are network namespaces joined by a pair of virtual Ethernet devices whose rate is limited (`tc`), so this needs root
on Linux; where namespaces cannot be made the benchmark says so and stops. The machine is calibrated, the link measured;
every plan is priced with what that gave, built, and run with `torchrun --nnodes 2`. Printed for each rate: step time of every
plan, predicted and measured, Spearman's rank correlation, and how the plan that the search chooses does against the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plans import CHOSEN, CORRELATION, LENGTH, MODELS, SEQUENCES, correlation, executable

from autopar.cluster.calibrate import calibrate
from autopar.errors import AutoparError
from autopar.spec.job import Pins

RATES = (100, 1000)  # Mbit/s
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29671
PLANS = [
    dict(tp=4),
    dict(tp=2, dp=2, zero=0, microbatch=4),
    dict(tp=2, dp=2, zero=1, microbatch=4),
    dict(tp=2, dp=2, zero=3, microbatch=4),
    dict(tp=2, pp=2, microbatch=1, schedule="1f1b"),
    dict(tp=2, pp=2, microbatch=4, schedule="1f1b"),
    dict(tp=1, dp=4, zero=0, microbatch=2),
    dict(tp=1, dp=4, zero=3, microbatch=2),
    dict(tp=1, dp=4, dp_replicate=2, dp_shard=2, zero=3, microbatch=2),
    dict(tp=1, pp=2, dp=2, zero=0, microbatch=1, schedule="1f1b"),
    dict(tp=1, pp=2, dp=2, zero=1, microbatch=2, schedule="1f1b"),
    dict(tp=1, pp=4, microbatch=1, schedule="1f1b"),
    dict(tp=1, pp=4, microbatch=2, schedule="gpipe"),
]


def asked_of(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two namespaces with an address each; yields their names. CalledProcessError or OSError where that cannot be."""
    names, ends = [f"autopar{os.getpid()}{x}" for x in "ab"], [f"ap{os.getpid() % 10**6}{x}" for x in "ab"]
    made = []
    try:
        for name in names:
            asked_of("ip", "netns", "add", name)
            made.append(name)
        asked_of("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            asked_of("ip", "link", "set", end, "netns", name)
            asked_of("ip", "-n", name, "link", "set", end, "name", "eth0")
            asked_of("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            asked_of("ip", "-n", name, "link", "set", "eth0", "up")
            asked_of("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def limit(names: list[str], rate: int) -> None:
    """Both directions of the link carry at most ``rate`` Mbit/s."""
    for name in names:
        rule = ["tbf", "rate", f"{rate}mbit", "burst", "64kb", "latency", "50ms"]
        asked_of("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", "root", *rule)


def launched(names: list[str], *arguments: str) -> Any:
    """What rank 0 of `_host_rank.py` wrote, run by two ranks on each host."""
    script = str(Path(__file__).with_name("_host_rank.py"))
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        processes = []
        for i, name in enumerate(names):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--node-rank", str(i), "--nproc-per-node", "2", "--master-addr", ADDRESSES[0]]
            command += ["--master-port", str(PORT), script, arguments[0], out, *arguments[1:]]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            errors = [p.communicate(timeout=300)[1] for p in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        if not Path(out).exists():
            raise RuntimeError(f"the ranks failed: {' '.join(errors)[-2000:]}")
        return json.loads(Path(out).read_text())


def cluster_of(machine: dict[str, Any], names: list[str], rate: int) -> dict[str, Any]:
    """The calibrated machine as two hosts, and the link as an all-reduce between two ranks found it: a cluster file gives the
    share of one device, and two share this one."""
    (small, fast), (large, slow) = launched(names, "link", "0")
    across = {"span": "cluster", "bandwidth": (large - small) / (slow - fast) / 2, "latency": fast / 2}
    links = [*machine["links"], across]
    return {**machine, "name": f"two hosts at {rate} Mbit/s", "devices_per_host": 2, "hosts": 2, "links": links}


def measured(cluster: dict[str, Any], names: list[str], pins: Pins, steps: int) -> tuple[str, float, float]:
    """The plan in words, its predicted and its measured seconds."""
    with tempfile.TemporaryDirectory() as folder:
        document = executable("llama", cluster, pins, Path(folder)).document
        times = launched(names, folder, str(steps))
    plan, mesh = document.plan, document.plan.mesh
    shard = f"={mesh.dp_replicate}×{mesh.dp_shard}" if mesh.dp_replicate > 1 and plan.zero else ""
    text = f"tp {mesh.tp} pp {mesh.pp} dp {mesh.dp}{shard} zero {plan.zero} mb {plan.microbatch} {plan.schedule}"
    return text, document.cost.step_seconds, statistics.median(times)


def compare(rate: int, names: list[str], machine: dict[str, Any], steps: int) -> bool:
    """One rate's table; whether its targets are met."""
    limit(names, rate)
    cluster = cluster_of(machine, names, rate)
    chosen = measured(cluster, names, Pins(), steps)
    rows = [chosen]
    for pins in PLANS:
        try:
            rows.append(measured(cluster, names, Pins(**pins), steps))
        except AutoparError as error:
            print(f"left out: {error}", file=sys.stderr)
    rho = correlation([r[1] for r in rows], [r[2] for r in rows])
    share = chosen[2] / min(r[2] for r in rows)
    found = cluster["links"][-1]
    print(
        f"\n{rate} Mbit/s, measured {16e-6 * found['bandwidth']:.0f} Mbit/s and {1e3 * found['latency']:.2f} ms; "
        f"{len(rows)} plans: rank correlation {rho:.3f} (target ≥ {CORRELATION}), chosen / fastest {share:.3f} (≤ {CHOSEN})\n"
    )
    print("| plan | predicted (ms) | measured (ms) | ratio |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda r: r[2]):
        mark = " ← chosen" if row is chosen else ""
        print(f"| {row[0]}{mark} | {1e3 * row[1]:.0f} | {1e3 * row[2]:.0f} | {row[1] / row[2]:.2f} |", flush=True)
    return rho >= CORRELATION and share <= CHOSEN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="*", type=int, default=list(RATES), help="of the link, in Mbit/s")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each plan; the median counts")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a target is missed")
    asked = parser.parse_args()
    print(f"llama of `plans.py`, {SEQUENCES} sequences of {LENGTH}; {MODELS['llama']['config']}")
    try:
        with two_hosts() as names:
            machine = calibrate(4)
            met = [compare(rate, names, machine, asked.rounds) for rate in asked.rates]
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        print(f"network namespaces cannot be made here ({str(said).strip()}); nothing was measured")
        return 0
    return int(asked.check and not all(met))


if __name__ == "__main__":
    sys.exit(main())
