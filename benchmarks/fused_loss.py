"""Peak memory and time of the output layer and its loss, forward and backward, with 128,256 classes: fused and not.

Each side runs in a process of its own; its peak is what the process holds at most beyond its weights and activations.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from autopar import kernels

CLASSES, WIDTH, ROWS = 128_256, 512, 1024  # Llama 3's vocabulary; tokens of one micro-batch
MEMORY_TARGET = 0.5
"""Peak of the fused side over that of the other, at most."""


def peak() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(fused: bool) -> dict[str, float]:
    """Run one side: bytes beyond what stood before, seconds of the second of two runs, and the loss."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    weight = (torch.randn(CLASSES, WIDTH) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(CLASSES, (ROWS,))
    weight.grad, x.grad = torch.ones_like(weight), torch.ones_like(x)  # there in any training step
    before = peak()
    for _ in range(2):
        start = time.perf_counter()
        if fused:
            loss = kernels.linear_cross_entropy(x, weight, labels)
        else:
            loss = F.cross_entropy(F.linear(x, weight), labels, reduction="sum")
        loss.backward()
        seconds = time.perf_counter() - start
    return {"bytes": peak() - before, "seconds": seconds, "loss": float(loss.detach())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("fused", "plain"), help="run one side and print it as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    parser.add_argument("--rounds", type=int, help="taken, for the sake of `make bench`; a peak needs no second run")
    given = parser.parse_args()
    if given.side:
        print(json.dumps(one(given.side == "fused")))
        return 0
    sides = {}
    for side in ("plain", "fused"):
        done = subprocess.run([sys.executable, __file__, "--side", side], capture_output=True, text=True, check=True)
        sides[side] = json.loads(done.stdout)
    plain, fused = sides["plain"], sides["fused"]
    assert abs(plain["loss"] - fused["loss"]) < 1e-4 * abs(plain["loss"]), sides
    ratio = fused["bytes"] / plain["bytes"]
    print(
        f"{ROWS:,} tokens of width {WIDTH}, {CLASSES:,} classes, float32; logits take {ROWS * CLASSES * 4 / 2**20:,.0f} MiB"
    )
    print("| side  | peak beyond operands and gradients (MiB) | seconds |")
    print("|-------|------------------------------------------|---------|")
    for name, made in sides.items():
        print(f"| {name} | {made['bytes'] / 2**20:,.0f} | {made['seconds']:.2f} |")
    print(f"ratio of peaks {ratio:.2f}, target ≤ {MEMORY_TARGET}")
    return int(given.check and ratio > MEMORY_TARGET)


if __name__ == "__main__":
    sys.exit(main())
