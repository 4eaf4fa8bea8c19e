"""One row for each model: what it is made of and what a token costs in it, from its traced graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from autopar.compare.attention import Heads, attentions
from autopar.compare.block import activation, form, gated, norms, place
from autopar.compare.costs import activation_bytes, by_role, experts
from autopar.compare.outer import objective, positions
from autopar.compare.tokens import tokenizer
from autopar.errors import SpecError
from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.solve.blocks import total_flops
from autopar.spec.origin import ModelOrigin, read_origin
from autopar.spec.source import Source

LENGTH = 2048
HALF = 2  # bytes of bfloat16
SMALL = (2, 16)  # sequences and length at which the graph's form is read


def compare_models(names: Iterable[str], length: int = LENGTH) -> list[dict[str, Any]]:
    """One row for each model: a name in specs/models, a model file, or a Hugging Face checkpoint's folder or GGUF file.

    ``parameters`` and their ``parts`` (by role); ``flops_per_token``, forward and backward for sequences of ``length``,
    attention not halved for causality; ``activation_bytes_per_layer``: what a training step in bfloat16 keeps of one block
    for one token of such a sequence; ``kv_cache_bytes_per_token``: keys and values of all layers in bfloat16.
    """
    return [row(origin_of(name), length) for name in names]


def origin_of(name: str) -> ModelOrigin:
    path = Path(name).expanduser()
    checkpoint = path.suffix == ".gguf" or (path / "config.json").is_file()
    return read_origin(Source({"hf": name} if checkpoint else name, "compare"))


def row(origin: ModelOrigin, length: int = LENGTH) -> dict[str, Any]:
    """What one model is made of. SpecError where its graph has no attention to speak of."""
    program = traced(origin, length)
    small = program.at(batch=SMALL[0], length=SMALL[1])
    large = program.at(batch=1, length=length)
    found = {name: attentions(graph, SMALL[0] * SMALL[1], SMALL[0]) for name, graph in small.graphs()}
    calls = Counter(str(call.target) for call in small.calls())
    counts = {name: calls.get(name, 1) for name, _ in small.graphs()}
    layers = sum(len(seen) * counts[name] for name, seen in found.items())
    main = max(found, key=lambda name: len(found[name]) * counts[name])
    if not layers:
        raise SpecError(f"compare: no attention is found in {origin}")
    heads, graph = found[main][0], dict(small.graphs())[main]
    kv = sum(h.kv_elements * counts[name] for name, seen in found.items() for h in seen)
    return {
        "model": str(origin),
        "tokenizer": tokenizer(origin, small),
        "positions": positions(small, heads),
        **shape(small, graph),
        "attention": ", ".join([heads.text, *extras(graph, heads)]),
        "objective": objective(small, heads, graph),
        "precision": precision(graph, heads),
        "layers": layers,
        "parameters": sum(p.numel for p in program.parameters.values() if p.alias_of is None),
        "parts": by_role(program),
        "tied": any(p.alias_of for p in program.parameters.values()),
        "flops_per_token": total_flops(large) / length,
        "activation_bytes_per_layer": activation_bytes(large, main) / length,
        "kv_cache_bytes_per_token": HALF * kv,
    }


def traced(origin: ModelOrigin, length: int) -> Program:
    """The model's program in bfloat16, without weights; experts are gathered, so that a token's work is counted."""
    spec = origin.decoder
    source: Any = origin
    if spec is not None:
        moe = None if spec.moe is None else spec.moe.model_copy(update={"dispatch": "gathered"})
        longest = length if spec.positions != "learned" else min(length, spec.max_length)
        if longest < length:
            raise SpecError(f"compare: --length {length} is more than the {longest} learned positions of {origin}")
        source = spec.model_copy(update={"moe": moe})
    model = build(source, meta=True, dtype=torch.bfloat16)
    return rewrite(trace(model, example_batch(model, *SMALL, source=origin)))


def shape(program: Program, graph: Any) -> dict[str, str | None]:
    """Norm and its place, activation, the block's form, biases."""
    seen = norms(graph)
    places = Counter(place(norm, graph) for norm in seen)
    act = activation(graph)
    kinds = ", ".join(dict.fromkeys(f"{n.kind}, eps {n.eps:.3g}" for n in seen)) or None
    where = " and ".join(p for p in ("pre", "output", "post") if places[p])
    heads = ", also of queries and keys" if places["heads"] else ""
    apart = sum(places[p] for p in ("pre", "post", "output"))
    block = None if act is None else f"{form(graph, act[1])}, {apart} norm{'s' if apart != 1 else ''}"
    mixture = experts(graph)
    if block is not None and mixture is not None:
        block += f", {mixture[0]} experts, {mixture[1]} for each token"
    return {
        "norm": None if kinds is None else f"{kinds}, {where}{heads}",
        "activation": None if act is None else f"{act[0]}{', gated' if gated(act[1]) else ''}",
        "block": block,
        "biases": biases(program),
    }


def biases(program: Program) -> str:
    """The roles of the modules that have one."""
    names = [n.removesuffix(".bias") for n in program.parameters if n.endswith(".bias")]
    return ", ".join(dict.fromkeys(program.roles.get(n, n.rpartition(".")[2]) for n in names)) or "none"


def extras(graph: Any, heads: Heads) -> list[str]:
    found = ["soft cap"] if heads.soft_cap else []
    return [*found, "one fused operator" if heads.fused else "written out"]


def precision(graph: Any, heads: Heads) -> str:
    """What computes in float32 although the model is in bfloat16."""
    wide = ["norms"] if any(n.wide for n in norms(graph)) else []
    if heads.fused:
        wide.append("softmax (inside the operator)")
    elif heads.softmax == torch.float32:
        wide.append("softmax")
    return f"float32: {', '.join(wide)}" if wide else "all in the model's own"
