"""Pretraining from a spec: a small LLaMA and a small ChatGLM learn Python's standard library, each a page of YAML.

The jobs are in specs/jobs; `autopar run pretrain-llama-local` and `autopar run pretrain-chatglm-local` do the same from
the shell. ChatGLM's tokenizer is trained on the text before the first step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from autopar.api import compile_job
from autopar.runtime import launch
from autopar.spec.load import load_job

JOBS = ("pretrain-llama-local", "pretrain-chatglm-local")


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    for name in JOBS:
        folder = compile_job(load_job(name, [f"train.steps={steps}"]), Path("builds") / name)
        status = launch.run(folder)
        if status:
            return status
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        print(f"{name}: loss {losses[0]:.2f} at the beginning, {losses[-1]:.2f} at the end", flush=True)
        if losses[-1] > losses[0] - 1:
            print("it has not learned", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
