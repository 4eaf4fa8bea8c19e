"""Programs of many kinds of model: sizes, modules, text, copies, and what the verifier finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_equal_to_eager, tokens
from nets import MLP, Averaging, Conv, Seq2Seq, TwoInputs
from test_traced_families import FAMILIES, batch_of, model_of
from torch import fx
from torch.nn import functional as F
from toys import VOCAB, WIDTH, Stack

from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from autopar.ir.verify import MalformedError, verify
from autopar.models.load import build


def vectors(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, WIDTH), "labels": torch.randint(5, (batch,))}


def images(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, 8, 8), "labels": torch.randint(5, (batch,))}


def two(batch: int) -> dict[str, Any]:
    ids = torch.randint(VOCAB, (batch, 7))
    return {"features": torch.randn(batch, 6), "tokens": ids, "labels": ids}


def pair(batch: int) -> dict[str, Any]:
    ids = torch.randint(VOCAB, (batch, 7))
    return {"source": ids, "target": ids, "labels": ids}


KINDS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int], dict[str, Any]], Any]] = {
    "mlp": (MLP, vectors, None),
    "mlp with a scalar loss": (MLP, vectors, lambda out, batch: F.cross_entropy(out, batch["labels"])),
    "mlp with a sum and a count": (MLP, vectors, lambda out, batch: (out.square().sum(), batch["labels"].numel())),
    "convolutions, group norm": (Conv, images, None),
    "convolutions, batch norm": (lambda: Conv("batch"), images, None),
    "two inputs, torch's encoder": (TwoInputs, two, None),
    "torch's encoder-decoder": (Seq2Seq, pair, None),
    "a buffer changed in forward": (Averaging, vectors, None),
}


@pytest.mark.parametrize("name", KINDS)
def test_models_of_all_kinds_compute_the_eager_bits(name: str) -> None:
    make, batch, loss = KINDS[name]
    torch.manual_seed(0)
    model = make()
    program = rewrite(trace(model, batch(4), loss=loss))
    verify(program)
    assert_equal_to_eager(program, model, [batch(4), batch(2)], loss)


def test_positions_masks_and_use_cache_are_inputs_like_others() -> None:
    model, base = model_of("llama"), batch_of("llama", 4, 16)
    mask = torch.ones(4, 16, dtype=torch.int64)
    mask[1, :5] = 0
    places = (torch.arange(16) + torch.arange(4)[:, None]) % 16
    for extra in ({"attention_mask": mask}, {"position_ids": places}, {"use_cache": True}):
        batch = {**base, **extra}
        assert_equal_to_eager(rewrite(trace(model, batch)), model, [batch])


def test_a_tuple_is_a_batch_of_positional_arguments() -> None:
    model = MLP()
    program = trace(model, (torch.randn(4, WIDTH),), loss=lambda out, batch: out.square().mean())
    value, count = program.module()(torch.ones(6, WIDTH))
    assert int(count) == 6
    assert torch.equal(value, model(torch.ones(6, WIDTH)).square().mean() * 6)


def test_a_model_on_the_meta_device_has_the_text_of_the_real_one() -> None:
    config = {"hf": "llama", "config": FAMILIES["llama"]}
    batch = batch_of("llama", 4, 16)
    assert str(trace(build(config, meta=True), batch)) == str(trace(build(config, meta=False), batch))


def test_sizes_are_put_in_everywhere() -> None:
    program = rewrite(trace(Stack(), tokens(VOCAB)(4, 6)))
    static = program.at(batch=5, length=9)
    verify(static)
    assert static.sizes == {}
    values = [n.meta.get("val") for _, graph in static.graphs() for n in graph.nodes]
    assert all(isinstance(d, int) for v in values if isinstance(v, torch.Tensor) for d in v.shape)
    embedded = next(n for n in static.graph.nodes if n.name == "embedding")
    assert tuple(embedded.meta["val"].shape) == (5, 9, WIDTH)
    assert embedded.meta["dims"] == (frozenset({"batch"}), frozenset({"sequence"}), frozenset())
    assert str(static.at(batch=2, length=6)) == str(program.at(batch=2, length=6))


def test_parameters_keep_their_names_and_their_memory() -> None:
    model = Stack()
    module = trace(model, tokens(VOCAB)(4, 6)).module()
    assert dict(module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(p is model.get_parameter(n) for n, p in module.named_parameters())
    assert module.state_dict().keys() == model.state_dict().keys()


def test_a_clone_is_independent_of_its_original() -> None:
    program = trace(Stack(), tokens(VOCAB)(4, 6))
    before, clone = str(program), program.clone()
    for _, graph in clone.graphs():
        for node in graph.nodes:
            node.meta.clear()
            if node.op == "call_function":
                node.kwargs = {"changed": 1}
    clone.parameters.clear()
    clone.history.append("changed")
    assert str(program) == before
    assert program.parameters
    assert program.history == []


TEXT = """
import torch
from autopar.ir.trace import trace
from toys import OtherConstant, Stack
ids = torch.zeros(4, 6, dtype=torch.int64)
model = Stack(OtherConstant)
for layer in model.layers:
    layer.scale = torch.arange(100).reshape(100, 1)[:8, 0] / 7 + 1
model.layers[0].scale = torch.arange(16)[:8] * 1.5
model.table = torch.arange(9.0)
print(trace(model, {"input_ids": ids, "labels": ids}))
"""


def test_the_text_is_the_same_in_every_process() -> None:
    here = Path(__file__).parent
    runs = [
        subprocess.run(
            [sys.executable, "-c", TEXT], cwd=here, env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout, runs[0].stderr.decode()[-500:]
    assert runs[0].stdout == runs[1].stdout


# ------------------------------------------------------------------ the verifier


def first(graph: fx.Graph, op: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == op)


def fewer_arguments(program: Program) -> None:
    call = first(program.graph, "call_module")
    call.args = call.args[:-1]


def wrong_argument(program: Program) -> None:
    call = first(program.graph, "call_module")
    call.args = (call.args[1], *call.args[1:])


def unknown_block(program: Program) -> None:
    first(program.graph, "call_module").target = "block_9"


def unread_block(program: Program) -> None:
    program.blocks["block_9"] = fx.Graph()
    program.blocks["block_9"].output(())


def unknown_parameter(program: Program) -> None:
    del program.parameters["head.weight"]


def no_kind(program: Program) -> None:
    del first(program.graph, "placeholder").meta["kind"]


def no_value(program: Program) -> None:
    del first(program.blocks["block_0"], "call_function").meta["val"]


def one_result(program: Program) -> None:
    out = program.graph.output_node()
    out.args = ((out.args[0][0],),)  # type: ignore[index]


def same_name(program: Program) -> None:
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    nodes[0].name = nodes[1].name


def late_use(program: Program) -> None:
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    nodes[0].args = (nodes[-1], *nodes[0].args[1:])


def nested_call(program: Program) -> None:
    graph = program.blocks["block_0"]
    with graph.inserting_before(graph.output_node()):
        graph.call_module("block_0", ())


BROKEN = [
    fewer_arguments,
    wrong_argument,
    unknown_block,
    unread_block,
    unknown_parameter,
    no_kind,
    no_value,
    one_result,
]
BROKEN += [same_name, late_use, nested_call]


@pytest.fixture(scope="module")
def stack() -> Program:
    return trace(Stack(), tokens(VOCAB)(4, 6))


@pytest.mark.parametrize("breaking", BROKEN)
def test_the_verifier_finds_each_kind_of_malformation(stack: Program, breaking: Callable[[Program], None]) -> None:
    program = stack.clone()
    verify(program)
    breaking(program)
    with pytest.raises((MalformedError, RuntimeError)):
        verify(program)
