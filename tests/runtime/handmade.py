"""A build folder written by hand, and the same model as plain modules: the runtime's test is independent of the emitter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from autopar.plan.plan import MeshShape, Plan, Stage

VOCAB, HIDDEN, INNER, LENGTH = 13, 10, 6, 5

COLLECTIVES = '''"""Identity forward, sum backward; and the other way round."""
import torch
import torch.distributed as dist


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.tp)
        return grad, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=tp)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def enter(x, tp):
    return x if tp is None else _Enter.apply(x, tp)


def leave(x, tp):
    return x if tp is None else _Leave.apply(x, tp)
'''

STAGE = '''"""Blocks {low} to {high} of the handmade model."""
import torch
from torch import nn
from torch.nn import functional as F

from collectives import enter, leave

DTYPE = torch.{dtype}


def p(*shape):
    return nn.Parameter(torch.empty(shape, dtype=DTYPE))


class Block(nn.Module):
    def __init__(self, tp):
        super().__init__()
        self.tp = tp
        self.norm, self.norm_bias, self.scale = p({hidden}), p({hidden}), p({hidden})
        self.up, self.down = p({inner} * 2 // {tp}, {hidden}), p({hidden}, {inner} // {tp})

    def forward(self, x):
        h = F.layer_norm(x, ({hidden},), self.norm, self.norm_bias)
        h = enter(h, self.tp) * self.scale
        gate, up = F.linear(h, self.up).chunk(2, -1)
        return x + leave(F.linear(F.silu(gate) * up, self.down), self.tp)


class Stage(nn.Module):
    def __init__(self, tp=None):
        super().__init__()
        if {first}:
            self.embed = p({vocab}, {hidden})
            self.register_buffer("shift", torch.empty({hidden}, dtype=DTYPE))
        self.blocks = nn.ModuleList(Block(tp) for _ in range({low}, {high}))
        if {last}:
            self.head, self.gain = p({vocab}, {hidden}), p()

    def forward(self, *received, input_ids=None, labels=None):
        x, ids = received if received else (F.embedding(input_ids, self.embed) + self.shift, input_ids)
        for block in self.blocks:
            x = block(x)
        if {last}:
            logits = F.linear(x, self.head) * self.gain
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
            return loss, self.count(labels=labels)
        return x.transpose(0, 1).contiguous().transpose(0, 1), ids

    def count(self, labels, input_ids=None):
        return (labels[:, 1:] != -100).sum()
'''


class ReferenceBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.up, self.down = nn.Linear(HIDDEN, 2 * INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        gate, up = self.up(self.norm(x) * self.scale).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Reference(nn.Module):
    """The model on one device. ``forward`` gives the mean loss over the counted labels."""

    def __init__(self, blocks: int = 4, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.register_buffer("shift", torch.linspace(-1, 1, HIDDEN))
        self.blocks = nn.ModuleList(ReferenceBlock() for _ in range(blocks))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.5))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, labels):
        x = self.embed(input_ids) + self.shift
        for block in self.blocks:
            x = block(x)
        logits = self.head(x) * self.gain
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def reference(blocks: int = 4, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64) -> Reference:
    torch.manual_seed(seed)
    return Reference(blocks, tied).to(dtype)


def plan_of(
    blocks: int = 4, *, pp: int = 1, dp: int = 1, tp: int = 1, zero: int = 0, microbatch: int = 2,
    microbatches: int = 2, schedule: str = "1f1b", virtual: int = 1, replicate: int = 1,
) -> Plan:  # fmt: skip
    count = pp * virtual
    cuts = [blocks * i // count for i in range(count + 1)]
    return Plan(
        mesh=MeshShape(pp=pp, dp=dp, tp=tp, dp_replicate=replicate), zero=zero, microbatch=microbatch, microbatches=microbatches,
        schedule=schedule, virtual_stages=virtual,
        stages=tuple(Stage(blocks=(cuts[i], cuts[i + 1] - 1)) for i in range(count)),
    )  # fmt: skip


def write(
    folder: Path, plan: Plan, *, tied: bool = False, frozen: tuple[str, ...] = (), dtype: str = "float64", job: str = ""
) -> Path:
    """The build folder of the handmade model under a plan. ``frozen``: beginnings of names."""
    (folder / "stages").mkdir(parents=True)
    (folder / "collectives.py").write_text(COLLECTIVES)
    (folder / "plan.json").write_text(plan.model_dump_json())
    (folder / "job.yaml").write_text(job or "{}")
    stages = [_stage(folder, plan, i, tied, frozen, dtype) for i in range(len(plan.stages))]
    inputs = {k: {"shape": [plan.microbatch, LENGTH], "dtype": "int64"} for k in ("input_ids", "labels")}
    manifest = {"stages": stages, "tied": [["embed.weight", "head.weight"]] if tied else [], "inputs": inputs}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _stage(folder: Path, plan: Plan, index: int, tied: bool, frozen: tuple[str, ...], dtype: str) -> dict:
    first, last, tp = index == 0, index == len(plan.stages) - 1, plan.mesh.tp
    low, high = plan.stages[index].blocks[0], plan.stages[index].blocks[1] + 1
    values = {"first": first, "last": last, "low": low, "high": high, "tp": tp, "dtype": dtype}
    text = STAGE.format(**values, hidden=HIDDEN, inner=INNER, vocab=VOCAB)
    (folder / "stages" / f"stage_{index}.py").write_text(text)

    def entry(path: str, name: str, shape: list[int], placement: str = "R", partial: bool = False) -> dict:
        trainable = not any(name.startswith(f) for f in frozen)
        kept = {"path": path, "name": name, "shape": shape, "dtype": dtype}
        return kept | {"placement": placement, "trainable": trainable, "partial_gradient": partial}

    parameters = [entry("embed", "embed.weight", [VOCAB, HIDDEN])] if first else []
    for i in range(low, high):
        here, name = f"blocks.{i - low}", f"blocks.{i}"
        parameters += [
            entry(f"{here}.norm", f"{name}.norm.weight", [HIDDEN]),
            entry(f"{here}.norm_bias", f"{name}.norm.bias", [HIDDEN]),
            entry(f"{here}.scale", f"{name}.scale", [HIDDEN], partial=True),
            entry(f"{here}.up", f"{name}.up.weight", [2 * INNER, HIDDEN], f"S(0|{INNER},{INNER})"),
            entry(f"{here}.down", f"{name}.down.weight", [HIDDEN, INNER], "S(1)"),
        ]
    if last:
        head = "embed.weight" if tied else "head.weight"
        parameters += [entry("head", head, [VOCAB, HIDDEN]), entry("gain", "gain", [])]
    shift = [
        {"path": "shift", "name": "shift", "shape": [HIDDEN], "dtype": dtype, "placement": "R", "persistent": True}
    ]
    values = [
        {"name": "hidden", "shape": [plan.microbatch, LENGTH, HIDDEN], "dtype": dtype, "requires_grad": True},
        {"name": "ids", "shape": [plan.microbatch, LENGTH], "dtype": "int64", "requires_grad": False},
    ]
    return {
        "module": f"stage_{index}", "units": [f"blocks.{i - low}" for i in range(low, high)],
        "inputs": ([*(["input_ids"] if first else []), *(["labels"] if last else [])]),
        "receives": [] if first else values, "sends": [] if last else values,
        "parameters": parameters, "buffers": shift if first else [],
    }  # fmt: skip


def batch_of(plan: Plan, step: int = 0) -> dict[str, torch.Tensor]:
    """A global batch whose ignored labels are spread unevenly over sequences (most of the last ones)."""
    sequences = plan.mesh.dp * plan.microbatches * plan.microbatch
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB, (sequences, LENGTH), generator=draw)
    labels = ids.clone()
    for i in range(sequences):
        labels[i, : 1 + (i * 3) % LENGTH] = -100
    return {"input_ids": ids, "labels": labels}


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest ‖a − b‖ / max(‖b‖, 1e-6 × the norm over all tensors)."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    whole = sum(float(t.double().square().sum()) for t in expected.values()) ** 0.5
    return max(
        float((found[n].double() - t.double()).norm()) / max(float(t.double().norm()), 1e-6 * whole)
        for n, t in expected.items()
    )
