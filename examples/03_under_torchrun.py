"""The engine in a script of your own: `torchrun --nproc-per-node 2 examples/03_under_torchrun.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist

import autopar
from autopar.models.load import build
from autopar.spec.job import Job

MODEL = {"hf": "llama", "config": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=256)}


def main() -> None:
    model = build(MODEL, meta=False, seed=0)  # any nn.Module; the same on every rank
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}

    job = Job.model_validate({"pins": {"dp": 2, "zero": 2}, "optimizer": {"lr": 1e-3}})
    executable = autopar.compile(model, {"name": "local-cpu", "devices_per_host": 2}, batch=batch, job=job)
    engine = executable.start()
    losses = [engine.step(batch) for _ in range(5)]
    weights = engine.state_dict()  # whole tensors, under the model's own names
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}; {len(weights)} tensors, such as {next(iter(weights))}")
        assert losses[-1] < losses[0] and weights.keys() >= dict(model.named_parameters()).keys()
    engine.leave()


if __name__ == "__main__":
    main()
