"""Published runs as pinned jobs of ours: the tables beside this file, and what a run does that no plan of ours can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autopar.cluster import Cluster

TABLES = Path(__file__).parent / "tables"
Row = dict[str, Any]
Table = dict[str, Any]

CLUSTERS = {
    "A100": "dgx-a100",
    "a100": "dgx-a100",
    "H100": "dgx-h100",
    "h100": "dgx-h100",
    "H200": "dgx-h200",
    "B200": "dgx-b200",
    "Blackwell": "dgx-b200",
}
GRAND_TETON = {"bandwidth": "2.4 TB/s"}
"""Meta's H100 have HBM2e of 96 GB (torchtitan benchmarks/llama3_h100_202412_torchtitan.md) and a limit of 500 W."""
POWER = ((500 - 100) / (700 - 100)) ** (1 / 3)
"""Clocks at 500 W beside those at 700 W: above what an idle device takes (100 W, an assumption), power goes with their cube."""
FUSED: list[dict[str, Any]] = [{"fused_norm": {}}, {"fused_rotary": {}}, {"fused_glu": {}}]
"""What stands in for torch.compile: kernels for the same chains of elementwise operators."""
TRITON = 1.8
"""llm-foundry's attention is FlashAttention in Triton, over which FlashAttention-2 is 1.3 to 2.5 times as fast (Dao 2023, section
4.1): their geometric mean."""
BOUNDLESS = "100000 GiB"  # where time alone is asked for


def table(name: str) -> Table:
    """``source``, ``note`` and ``rows`` of one published table."""
    return json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))


def cluster(device: str, devices: int, memory: str | None = BOUNDLESS) -> dict[str, Any]:
    """The cluster of a run; ``memory``: of a device, None for its own."""
    name = next(v for k, v in CLUSTERS.items() if k in device)
    own = dict(GRAND_TETON) if "HBM2e" in device else {}
    made: dict[str, Any] = {"name": name, "hosts": max(1, -(-devices // 8)), "device": own}
    if "500W" in device or "HBM2e" in device:
        known = Cluster.load(name).device.efficiency
        assert known.attention is not None
        own["efficiency"] = {
            "matmul": [[0, known.matmul[-1][1] * POWER]],
            "attention": [share * POWER for share in known.attention],
        }
    if devices < 8:
        made["devices_per_host"] = devices
    if memory:
        own["memory"] = memory
    return made


KEPT = {"master": "float16", "reduce": "float32"}


def megatron(row: Row, **pins: Any) -> dict[str, Any]:
    """A GPT of Megatron-LM: float16, dropout, 2,048 tokens, A100. It computes with float16 weights that it keeps, and a
    float32 copy is the optimizer's: so the weights are kept in float16 here, not cast in every micro-batch."""
    virtual = row["virtual"]
    pinned = {"tp": row["tp"], "pp": row["pp"], "dp": row["dp"], "zero": row.get("zero", 0), "microbatch": row["microbatch"],
              "schedule": "interleaved1f1b" if virtual > 1 else "1f1b", "virtual_stages": virtual, "recompute": "full",
              "sequence_parallel": False}  # fmt: skip
    drop = {"embedding": 0.1, "attention": 0.1, "hidden": 0.1}
    model = {"family": "gpt", "layers": row["layers"], "hidden": row["hidden"], "heads": row["heads"], "vocab": 51200,
             "max_length": 2048, "dropout": drop}  # fmt: skip
    return job(model, cluster("A100", row["devices"]), row["sequences"], 2048, pinned | pins, "float16", [], KEPT)


def megatron_core(row: Row) -> dict[str, Any]:
    """A GPT of Megatron-Core on H100; what its table does not print is left to the planner."""
    model = {"family": "gpt", "layers": row["layers"], "hidden": row["hidden"], "heads": row["heads"], "vocab": 131072,
             "max_length": 4096, "tied": False}  # fmt: skip
    pins = {k: row[k] for k in ("tp", "pp", "dp")} | ({"sequence_parallel": True} if row["tp"] > 1 else {})
    machine = cluster("H100", row["devices"], None)
    return job(model, machine, row["sequences"], 4096, pins, "bfloat16", [{"flash_attention": {}}])


def torchtitan(row: Row, memory: str | None = BOUNDLESS) -> dict[str, Any]:
    """A Llama under FSDP2."""
    model = {"family": "llama", **{k: row[k] for k in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")},
             "max_length": row["length"], "tied": False}  # fmt: skip
    pins = {"tp": row["tp"], "pp": row["pp"], "dp": row["dp"], "zero": row["zero"], "microbatch": row["microbatch"],
            "recompute": "full" if row.get("recompute") == "full" else "none"}  # fmt: skip
    if row["tp"] > 1:
        pins["sequence_parallel"] = True
    passes = [{"sdpa_attention": {}}, *(FUSED if row.get("compile") else [])]
    return job(
        model, cluster(row["device"], row["devices"], memory), row["sequences"], row["length"], pins, "bfloat16", passes
    )


def foundry(row: Row) -> dict[str, Any]:
    """An MPT under FSDP; positions are learned here, where MPT has ALiBi inside its attention kernel."""
    bias = {"qkv": False, "output": False, "up": False, "down": False, "norm": False}
    model = {"family": "gpt", "layers": row["layers"], "hidden": row["hidden"], "heads": row["heads"], "vocab": 50368,
             "max_length": row["length"], "bias": bias}  # fmt: skip
    pins = {
        "tp": 1,
        "pp": 1,
        "dp": row["devices"],
        "zero": 3,
        "microbatch": row["microbatch"],
        "recompute": row["recompute"],
    }
    made = job(model, cluster(row["device"], row["devices"]), row["sequences"], row["length"], pins, "bfloat16",
               [{"flash_attention": {}}])  # fmt: skip
    made["passes"][0]["mixed_precision"]["reduce"] = "bfloat16"
    if row["device"] == "a100_40gb":
        made["cluster"]["name"] = "dgx-a100-40gb"
    known = Cluster.load(made["cluster"]["name"]).device.efficiency.attention
    assert known is not None
    made["cluster"]["device"]["efficiency"] = {"attention": [share / TRITON for share in known]}
    return made


def megatron_v100(row: Row) -> dict[str, Any]:
    """A GPT of Megatron-LM 1.0 on a DGX-2H, whose V100 run at 130 TFLOP/s."""
    made = megatron(row)
    made["model"]["max_length"] = made["batch"]["length"] = 1024
    device = {"memory": BOUNDLESS, "flops_per_second": {"float64": 7.8e12, "float32": 15.7e12, "float16": 130e12}}
    made["cluster"] = {"name": "dgx-v100", "devices_per_host": row["devices"], "hosts": 1, "device": device}
    return made


def fms(row: Row) -> dict[str, Any]:
    """A Llama 2 under FSDP1, on hosts whose eight devices share a slower network."""
    model = {"family": "llama", **{k: row[k] for k in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")},
             "max_length": row["length"], "tied": False}  # fmt: skip
    pins = {"tp": 1, "pp": 1, "dp": row["devices"], "dp_shard": row["dp_shard"], "zero": 3, "microbatch": row["microbatch"],
            "recompute": "full" if row["recomputed"] == 1 else "none"}  # fmt: skip
    machine = cluster(row["device"], row["devices"])
    host, network = Cluster.load(machine["name"]).links
    machine["links"] = [
        {"span": "host", "bandwidth": host.bandwidth, "latency": host.latency, "efficiency": host.efficiency},
        {"span": "cluster", "bandwidth": row["host_gbit"] * 1e9 / 64, "latency": network.latency,
         "efficiency": network.efficiency},
    ]  # fmt: skip
    passes = [{"sdpa_attention": {}}, *FUSED]
    made = job(model, machine, row["sequences"], row["length"], pins, "bfloat16", passes)
    made["passes"][0]["mixed_precision"]["reduce"] = "bfloat16"
    return made


def job(
    model: dict[str, Any], machine: dict[str, Any], sequences: int, length: int, pins: dict[str, Any], compute: str,
    passes: list[dict[str, Any]], kept: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {"model": model, "cluster": machine, "batch": {"sequences": sequences, "length": length},
            "passes": [{"mixed_precision": {"compute": compute, **(kept or {})}}, *passes], "pins": pins, "train": {"clip": 1.0},
            "search": {"memory_margin": 0.0}}  # fmt: skip


# ------------------------------------------------------------------ what cannot be compared


def beyond(row: Row) -> str:
    """What a run does that no plan of ours does, so that its numbers are not to be compared; empty if nothing."""
    if row.get("zero") == 3 and "DeepSpeed" in row.get("scheme", ""):
        return "DeepSpeed of 2021 gathers parameter by parameter"
    precision, device = row.get("precision", "bf16"), row.get("device", "")
    if precision.lower() != "bf16":
        return f"trains in {precision}"
    if row.get("cp", 1) > 1:
        return "context parallel"
    if "Blackwell" in device or "power limited" in device:
        return "the device or its power limit is not named"
    if row.get("async_tp") or row.get("tp_overlap"):
        return "products in pieces hide the collectives of tensor parallelism"
    return ""


def partly(row: Row) -> str:
    """What a run does that the plan beside it does only in a like way."""
    recompute = str(row.get("recompute"))
    if "op" in recompute:
        return "recomputes every second product; beside it, every second block"
    if row.get("tp", 1) > 1 and "kv_heads" in row:
        return "gathers activations over tp; our plan gathers weights where they are less"
    return "torch.compile; beside it, fused kernels" if row.get("compile") else ""


def recomputed(row: Row) -> float:
    """The share of what there is that is recomputed: every second block in our plan, where a run repeats every second product."""
    return row.get("recomputed", 0.5 if alternates(row) else 0.0)


def alternates(row: Row) -> bool:
    """Whether half of what there is is recomputed: every second block in our plan."""
    return "every 2nd" in str(row.get("recompute")) or "op" in str(row.get("recompute"))
