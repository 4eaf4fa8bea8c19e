"""Tensor parallelism on two CPU processes: the emitted step against torch's DTensor and against code written by hand.

One step is forward, loss and backward of one micro-batch. All sides hold the same weights and compute the same loss.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _measure import Row, Step, Times, compared, executable, interleaved, options, report, slowest
from _models import MLP, Block, Decoder, Norm, Sizes, loss_sum, rotary, shifted, squared_error, text
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from autopar.runtime.engine import Engine
from autopar.runtime.spawn import spawn

RANKS = 2
BLOCKS, WIDTH, INNER, TOKENS = 8, 256, 1024, 64
SIZES = Sizes()
SEQUENCES, LENGTH = 4, 64
COLUMN, ROW = ColwiseParallel(), RowwiseParallel()


# ------------------------------------------------------------------ by hand


class Enter(torch.autograd.Function):
    """Megatron's f: nothing forward, the sum of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class Leave(torch.autograd.Function):
    """Megatron's g: the sum forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class SplitCrossEntropy(torch.autograd.Function):
    """The summed loss of logits (tokens, classes / ranks), as Megatron's: exp, sum and target by three all-reduces."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        top = logits.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        shifted_logits = logits - top[:, None]
        own = labels - dist.get_rank() * logits.shape[1]
        other = (own < 0) | (own >= logits.shape[1])
        own = own.masked_fill(other, 0)
        target = shifted_logits.gather(1, own[:, None])[:, 0].masked_fill(other, 0)
        dist.all_reduce(target)
        softmax = shifted_logits.exp_()
        total = softmax.sum(-1)
        dist.all_reduce(total)
        softmax.div_(total[:, None])
        counted = labels >= 0
        ctx.save_for_backward(softmax, own, other, counted)
        return (total.log() - target).masked_fill(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        softmax, own, other, counted = ctx.saved_tensors
        rows = torch.arange(len(own))
        softmax[rows, own] -= (~other).to(softmax.dtype)
        return softmax.mul_((counted * grad)[:, None]), None


class HandMLP(nn.Module):
    """This rank's columns and rows of every block."""

    def __init__(self, whole: MLP, rank: int):
        super().__init__()
        self.ups = nn.ParameterList(b.up.weight.detach().chunk(RANKS, 0)[rank].clone() for b in whole.blocks)
        self.downs = nn.ParameterList(b.down.weight.detach().chunk(RANKS, 1)[rank].clone() for b in whole.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + Leave.apply(F.linear(F.gelu(F.linear(Enter.apply(x), up)), down))
        return x


class HandDecoder(nn.Module):
    """Heads, inner features and the vocabulary split; norms and the residual stream on every rank."""

    def __init__(self, whole: Decoder, rank: int):
        super().__init__()
        sizes = whole.sizes
        self.rank, self.rows, self.head_size = rank, sizes.vocabulary // RANKS, sizes.head
        self.embedding = nn.Parameter(torch.empty(self.rows, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes, RANKS, Enter.apply, Leave.apply) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width)
        self.head = nn.Linear(sizes.width, self.rows, bias=False)
        full = {n.replace("embedding.weight", "embedding"): p for n, p in whole.state_dict().items()}
        for name, own in self.state_dict().items():
            dim = next((d for d in range(own.dim()) if own.shape[d] != full[name].shape[d]), None)
            own.copy_(full[name] if dim is None else full[name].chunk(RANKS, dim)[rank])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        own = input_ids - self.rank * self.rows
        other = (own < 0) | (own >= self.rows)
        x = F.embedding(own.masked_fill(other, 0), self.embedding).masked_fill(other[..., None], 0)
        x = Leave.apply(x)
        cos, sin = rotary(x.shape[1], self.head_size, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(Enter.apply(self.norm(x)))


# ------------------------------------------------------------------ the sides


def emitted(folder: str, batch: dict[str, torch.Tensor]) -> Step:
    engine = Engine(folder)

    def step() -> float:
        loss = engine.accumulate(batch)
        for held in engine.held:
            held.parameter.grad = None
        return loss

    return step


def backward(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    def step() -> float:
        value = loss()
        value.backward()
        module.zero_grad()
        return float(value.detach())

    return step


def mlp_sides(folder: str, batch: dict[str, torch.Tensor], whole: MLP) -> dict[str, Step]:
    def mean(module: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: F.mse_loss(module(batch["x"]), batch["target"])

    hand = HandMLP(whole, dist.get_rank())
    for block in whole.blocks:
        parallelize_module(block, init_device_mesh("cpu", (RANKS,)), {"up": COLUMN, "down": ROW})
    return {"ours": emitted(folder, batch), "hand": backward(hand, mean(hand)), "dtensor": backward(whole, mean(whole))}


def decoder_sides(folder: str, batch: dict[str, torch.Tensor], whole: Decoder) -> dict[str, Step]:
    ids, labels = batch["input_ids"], shifted(batch["labels"]).flatten()
    count = (labels >= 0).sum()

    def hand_loss() -> torch.Tensor:
        return SplitCrossEntropy.apply(hand(ids).flatten(0, 1), labels) / count

    hand = HandDecoder(whole, dist.get_rank())
    parts = {f"attention.{n}": COLUMN for n in "qkv"} | {"attention.o": ROW}
    parts |= {"feed_forward.gate": COLUMN, "feed_forward.up": COLUMN, "feed_forward.down": ROW}
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in whole.blocks:
        parallelize_module(block, mesh, parts)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(whole, mesh, ends)

    def dtensor() -> float:
        with loss_parallel():
            value = loss_sum(whole(ids), batch["labels"]) / count
            value.backward()
        whole.zero_grad()
        return float(value.detach())

    return {"ours": emitted(folder, batch), "hand": backward(hand, hand_loss), "dtensor": dtensor}


# ------------------------------------------------------------------ both models


def model_of(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same weights and batch wherever it is called."""
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP(BLOCKS, WIDTH, INNER), {"x": torch.randn(TOKENS, WIDTH), "target": torch.randn(TOKENS, WIDTH)}
    return Decoder(SIZES), text(SEQUENCES, LENGTH, SIZES.vocabulary)


def rank_times(kind: str, folder: str, rounds: int) -> Times:
    model, batch = model_of(kind)
    sides = mlp_sides if kind == "mlp" else decoder_sides
    return interleaved(sides(folder, batch, model), rounds)


def measured(kind: str, name: str, rounds: int) -> list[Row]:
    model, batch = model_of(kind)
    with tempfile.TemporaryDirectory() as folder:
        loss = squared_error if kind == "mlp" else None
        executable(model, batch, Path(folder), devices=RANKS, loss=loss, tp=RANKS, sequence_parallel=False)
        times = slowest(spawn(rank_times, RANKS, kind, folder, rounds, timeout=600.0))
    return [
        compared(f"{name}, against DTensor", times, "ours", "dtensor", 1.2, most=False),
        compared(f"{name}, against code by hand", times, "ours", "hand", 1.03),
    ]


def main() -> int:
    given = options(__doc__, rounds=100)
    rows = measured("mlp", f"MLP of {BLOCKS} blocks, {WIDTH}×{INNER}", given.rounds)
    rows += measured("decoder", f"decoder of {SIZES.layers} layers, width {SIZES.width}", given.rounds)
    return report(rows, given.check)


if __name__ == "__main__":
    sys.exit(main())
