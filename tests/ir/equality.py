"""Comparing programs with each other and with the eager model they were traced from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from autopar.ir.objective import Loss, Objective
from autopar.ir.program import Program
from autopar.ir.text import target_text, type_text

Batch = dict[str, Any]


def unfolded(program: Program) -> list[tuple[Any, ...]]:
    """Every operator of a program with its blocks opened at their calls: records that are equal for equal programs."""
    records: list[tuple[Any, ...]] = []

    def run(graph: fx.Graph, prefix: str, given: list[Any] | None) -> tuple[Any, ...]:
        env: dict[fx.Node, Any] = {}
        places = iter(given or ())
        for node in graph.nodes:
            if node.op == "placeholder":
                own = f"{node.meta['kind']} {node.meta['name']}{node.meta.get('constant', '')}"
                env[node] = next(places) if given is not None else own
            elif node.op == "output":
                return tuple(env[n] for n in node.args[0])
            elif node.op == "call_module":
                path = f"{node.meta['path']}."
                env[node] = run(program.blocks[str(node.target)], path, [env[a] for a in node.args])
            elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                said = fx.node.map_aggregate(
                    (node.args, node.kwargs), lambda a: env.get(a, a) if hash_ok(a) else str(a)
                )
                env[node] = f"%{len(records)}"
                path = node.meta["path"] if prefix == "" else prefix + node.meta["path"]
                records.append((target_text(node), str(said), type_text(node.meta["val"]), path.rstrip(".")))
        raise AssertionError("a graph without output")

    records.append(run(program.graph, "", None))
    return records


def hash_ok(value: Any) -> bool:
    return isinstance(value, fx.Node)


def assert_equal_to_eager(
    program: Program, model: nn.Module, batches: list[Batch], loss: Loss | None = None, seed: int | None = None
) -> None:
    """Loss, count, every gradient and every buffer of the program are the eager model's, bit for bit."""
    objective, module = Objective(model.train(), loss), program.module()
    start = {n: b.clone() for n, b in model.named_buffers()}
    for batch in batches:
        results = []
        for run in (lambda b: objective(dict(b)), lambda b: module(**b)):
            model.zero_grad()
            restore(model, start)
            if seed is not None:
                torch.manual_seed(seed)
            value, count = run(batch)
            value.backward()
            results.append((value.detach(), count, gradients(model), {n: b.clone() for n, b in model.named_buffers()}))
        (value, count, grads, buffers), (value_, count_, grads_, buffers_) = results
        assert torch.equal(value, value_), (value, value_)
        assert int(count) == int(count_)
        assert grads.keys() == grads_.keys()
        for name, grad in grads.items():
            assert torch.equal(grad, grads_[name]), name
        for name, buffer in buffers.items():
            assert torch.equal(buffer, buffers_[name]), name
    model.zero_grad()


def restore(model: nn.Module, start: dict[str, torch.Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(start[name])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def tokens(vocab: int, *, ignored: bool = True) -> Callable[[int, int], Batch]:
    """A maker of language batches of any size, with some labels ignored."""

    def make(batch: int, length: int) -> Batch:
        draw = torch.Generator().manual_seed(100 * batch + length)
        ids = torch.randint(1, vocab, (batch, length), generator=draw)
        labels = torch.randint(1, vocab, (batch, length), generator=draw)
        if ignored:
            labels[0, 2:5] = -100
        return {"input_ids": ids, "labels": labels}

    return make
