"""Your own nn.Module and loss, planned for two processes, saved, and proved equal to one device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.proof import prove_module
from autopar.spec.job import Job


class Perceptron(nn.Module):
    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output, batch["y"])


def main() -> None:
    torch.manual_seed(0)
    model = Perceptron()
    batch = {"x": torch.randn(16, 64), "y": torch.randn(16, 64)}
    cluster = {"name": "local-cpu", "devices_per_host": 2}

    executable = autopar.compile(model, cluster, batch=batch, loss=loss)
    folder = executable.save("builds/own-module")
    print(f"the plan: {executable.plan.mesh}; the code: {folder}/stages/stage_0.py")

    job = Job.model_validate({"cluster": cluster, "batch": {"sequences": 16, "length": 1}, "pins": {"tp": 2}})
    proof = prove_module(model, batch, job, loss=loss)
    print(f"split over two processes, largest gradient error {proof['gradient_error']:.1e}, equal: {proof['equal']}")
    assert proof["equal"]


if __name__ == "__main__":
    main()
