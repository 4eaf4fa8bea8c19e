"""Measure this machine: its device's matmul rates, memory, launch time, and the links between its devices."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import yaml

from autopar.errors import SpecError
from autopar.spec.cluster import read_cluster, this_machines_memory
from autopar.spec.source import Source

if TYPE_CHECKING:
    import torch

SIZES = (32, 128, 512, 1024, 2048, 4096)  # of square matrices
COPIES = (2**12, 2**16, 2**20, 2**24, 2**27)  # bytes
MESSAGES = (2**6, 2**22)  # bytes of an all-reduce: one that is all latency, one that is mostly bandwidth
PER_POINT = 0.15  # seconds of repeating one measurement
TOO_SLOW = 0.5  # seconds of one call from which on larger ones are not tried
MOST_RANKS = 8  # processes measured at once
DTYPES = ("float64", "float32", "bfloat16", "float16")


def calibrate(devices: int | None = None) -> dict[str, Any]:
    """This machine as the data of a cluster file; takes well under a minute. SI units.

    A machine with CUDA is measured as its accelerators, another as one device for each core, or as so many ``devices``
    (at most 8), which share the cores; all are busy at once, as they are in a run. Raises SpecError for more, and where
    processes cannot talk to each other.
    """
    import torch

    accelerated = torch.cuda.is_available()
    devices = _devices(devices, torch.cuda.device_count() if accelerated else os.cpu_count() or 1, accelerated)
    results = _on_ranks(min(devices, MOST_RANKS), "cuda" if accelerated else "cpu")
    device = _mean([result["device"] for result in results])
    spec: dict[str, Any] = {"name": "this-machine", "device": device, "devices_per_host": devices, "hosts": 1}
    device["memory"] = torch.cuda.mem_get_info()[1] if accelerated else this_machines_memory() // devices
    device["name"] = torch.cuda.get_device_name() if accelerated else "cpu-core"
    if devices > 1:
        spec["links"] = [{"span": "host", **_fit(results[0]["all_reduce"], len(results))}]
    read_cluster(Source(spec, "calibrate"))
    return spec


def _devices(asked: int | None, there: int, accelerated: bool) -> int:
    if asked is None:
        return there
    most = there if accelerated else MOST_RANKS
    if not 1 <= asked <= most:
        raise SpecError(f"calibrate: --devices {asked} cannot be measured here; 1 to {most} can")
    return asked


def as_yaml(measured: dict[str, Any]) -> str:
    """The cluster file's text."""
    import platform

    import torch

    head = (
        f"# Measured by `autopar calibrate`: torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores.\n"
    )
    return head + yaml.safe_dump(measured, sort_keys=False, default_flow_style=None, width=120)


def _on_ranks(ranks: int, kind: str) -> list[dict[str, Any]]:
    """Run the measurements in processes of their own, all at once."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        try:
            processes.spawn(_rank, args=(ranks, kind, folder), nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:
            text = " ".join(str(error).split())[-300:]
            raise SpecError(f"calibrate: a measuring process failed: {text}") from error
        found = []
        for rank in range(ranks):
            with open(f"{folder}/{rank}.yaml", encoding="utf-8") as file:
                found.append(yaml.safe_load(file))
        return found


def _rank(rank: int, ranks: int, kind: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found: dict[str, Any] = {"all_reduce": []}
    if ranks > 1:
        store = dist.FileStore(f"{folder}/store", ranks)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
        found["all_reduce"] = [(size, _all_reduce(size, kind)) for size in MESSAGES]
        dist.barrier()
    found["device"] = _device(kind)
    with open(f"{folder}/{rank}.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(found, file)
    if ranks > 1:
        dist.barrier()
        os._exit(0)  # all is written: gloo's threads are not taken apart, which can abort (see `runtime.world.leave`)


def _device(kind: str) -> dict[str, Any]:
    """What one device does alone: peak rates, curves of the shares reached by size, launch time."""
    import torch

    rates = {name: _matmul(getattr(torch, name), kind) for name in DTYPES}
    peaks = {name: max(rate for _, rate in points) for name, points in rates.items() if points}
    main = "bfloat16" if kind == "cuda" else "float32"
    copies = [(size, _copy(size, kind)) for size in COPIES]
    bandwidth = copies[-1][1]  # of memory, not of a cache
    launch = _seconds(lambda x: x + 1, kind, torch.ones(1, device=kind))
    return {
        "bandwidth": bandwidth,
        "flops_per_second": peaks,
        "kernel_latency": launch,
        "efficiency": {
            "matmul": _rising([(flops, rate / peaks[main]) for flops, rate in rates[main]]),
            "memory": _rising([(size, min(1.0, rate / bandwidth)) for size, rate in copies]),
        },
    }


def _matmul(dtype: torch.dtype, kind: str) -> list[tuple[float, float]]:
    """(FLOPs of one call, FLOP/s) of growing square products; empty where the device has no such product."""
    import torch

    points = []
    for n in SIZES:
        try:
            a = torch.randn(n, n, device=kind).to(dtype)
            seconds = _seconds(torch.mm, kind, a, a)
        except RuntimeError:
            return points
        points.append((2.0 * n**3, 2.0 * n**3 / seconds))
        if seconds > TOO_SLOW / 8:  # the next size takes eight times as long
            break
    return points


def _copy(size: int, kind: str) -> float:
    """Bytes read and written per second when a tensor of ``size`` bytes is copied."""
    import torch

    source = torch.ones(size // 4, device=kind)
    target = torch.empty_like(source)
    return 2 * size / _seconds(target.copy_, kind, source)


def _all_reduce(size: int, kind: str) -> float:
    """Seconds of an all-reduce of ``size`` bytes over all ranks: the median of a fixed number, equal on every rank."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(size // 4, device=kind)
    times = []
    for _ in range(25):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(kind)
        times.append(time.perf_counter() - start)
    return sorted(times[5:])[10]


def _seconds(function: Callable[..., Any], kind: str, *args: Any) -> float:
    """Seconds of one call, the best of a few rounds."""
    function(*args)
    _wait(kind)
    best, begun, calls = math.inf, time.perf_counter(), 1
    while time.perf_counter() - begun < PER_POINT:
        start = time.perf_counter()
        for _ in range(calls):
            function(*args)
        _wait(kind)
        spent = time.perf_counter() - start
        best = min(best, spent / calls)
        calls = calls if spent > PER_POINT / 10 else calls * 2
    return best


def _wait(kind: str) -> None:
    if kind == "cuda":
        import torch

        torch.cuda.synchronize()


def _rising(points: list[tuple[float, float]]) -> list[list[float]]:
    """Shares that never fall with size: noise and caches do not make a small call better than a large one."""
    best, curve = 0.0, []
    for size, share in points:
        best = max(best, share)
        curve.append([size, round(best, 4)])
    return curve


def _mean(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """The geometric mean of the ranks' rates; the curves of the first rank."""

    def over(read: Callable[[dict[str, Any]], float]) -> float:
        return float(f"{math.exp(sum(math.log(read(d)) for d in devices) / len(devices)):.4g}")

    names = [name for name in DTYPES if all(name in d["flops_per_second"] for d in devices)]
    return {
        "name": "",
        "memory": 0,
        "bandwidth": over(lambda d: d["bandwidth"]),
        "flops_per_second": {name: over(lambda d, n=name: d["flops_per_second"][n]) for name in names},
        "kernel_latency": over(lambda d: d["kernel_latency"]),
        "efficiency": devices[0]["efficiency"],
    }


def _fit(times: list[tuple[int, float]], ranks: int) -> dict[str, float]:
    """Bandwidth and latency of a ring all-reduce of n ranks: 2(n-1) steps, 2(n-1)/n of the bytes over each link."""
    (small, fast), (large, slow) = times
    steps, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    bandwidth = share * (large - small) / max(slow - fast, 1e-9)
    return {"bandwidth": float(f"{bandwidth:.4g}"), "latency": float(f"{fast / steps:.4g}")}
