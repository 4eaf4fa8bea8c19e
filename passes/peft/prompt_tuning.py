"""prompt_tuning: trained vectors before the embedded tokens (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from typing import Any, ClassVar

import pydantic
import torch
from torch import fx

from autopar.errors import PassError
from autopar.ir.adapters import Affine, Saved
from autopar.ir.causal import ancestors
from autopar.ir.edit import add_parameter, freeze, own_path
from autopar.ir.initial import Initial, kaiming_uniform
from autopar.ir.lengthen import need_symbols, padded, plus, renewed, sequence_dims, symbols_of
from autopar.ir.ops import Embedding, view
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.parts import Maker, record, replacing

aten = torch.ops.aten
RANGE = 0.5
"""Lester et al. 2021, section 3.2: random prompts are drawn uniformly from [−0.5, 0.5]."""


class PromptTuning(Pass):
    """``tokens`` trained vectors stand before the embedded tokens of every sequence; everything else is frozen.

    Positions and masks follow from the longer sequence; nothing is predicted at the virtual tokens but the first real one
    by the last of them, as in peft. ``encoder`` (P-tuning, Liu et al. 2021, arXiv:2103.10385): the vectors are made by a
    perceptron of two hidden layers of that size.
    """

    name: ClassVar[str] = "prompt_tuning"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    tokens: int = pydantic.Field(20, ge=1)
    encoder: int | None = pydantic.Field(None, ge=1)

    def rewrite(self, program: Program) -> None:
        need_symbols(program, self.name)
        seen = token_embedding(program, self.name)
        last = end_of(seen.node)
        freeze(program)
        lengthen(program, seen, last, self.tokens, self.name)
        width = int(last.meta["val"].shape[-1])
        prompt, saved = self.prompt(program, width, seen.weight.meta["val"].dtype)
        with replacing(program.graph, last, "") as (make, made):
            vectors, batch = self.encoded(make, prompt), last.meta["val"].shape[0]
            whole = make(aten.expand.default, make(aten.unsqueeze.default, vectors, 0), [batch, -1, -1])
            made.append(make(aten.cat.default, [whole, last], 1))
        made = () if self.encoder else ("P_TUNING",)  # whose files hold the vectors that an encoder made
        record(program, self, *self.config(width), {"prompt_embeddings": saved}, ("num_virtual_tokens",), made)

    def prompt(self, program: Program, width: int, dtype: torch.dtype) -> tuple[list[fx.Node], Saved]:
        """The parameters, first the vectors themselves, and how the file holds them."""
        names, shapes = [f"prompt.{self.name}.embedding.weight"], [(self.tokens, width)]
        sizes = (
            [] if self.encoder is None else [(width, self.encoder), (self.encoder, self.encoder), (self.encoder, width)]
        )
        for i, (into, out) in enumerate(sizes):
            names += [f"prompt.{self.name}.mlp_head.{2 * i}.weight", f"prompt.{self.name}.mlp_head.{2 * i}.bias"]
            shapes += [(out, into), (out,)]
        first: list[Any] = [Initial("uniform", RANGE), *(kaiming_uniform(into) for into, _ in sizes for _ in range(2))]
        nodes = [add_parameter(program, OUTER, n, s, dtype, i) for n, s, i in zip(names, shapes, first, strict=True)]
        through = tuple(Affine(weights=(w,), biases=(b,)) for w, b in zip(names[1::2], names[2::2], strict=True))
        return nodes, Saved(parts=(names[0],), through=through, activation="relu")

    def encoded(self, make: Maker, nodes: list[fx.Node]) -> fx.Node:
        value = nodes[0]
        for i, (weight, bias) in enumerate(zip(nodes[1::2], nodes[2::2], strict=True)):
            value = make(aten.relu.default, value) if i else value
            value = make(aten.linear.default, value, weight, bias)
        return value

    def config(self, width: int) -> tuple[str, dict[str, Any]]:
        common = {"num_virtual_tokens": self.tokens, "token_dim": width, "num_transformer_submodules": 1}
        if self.encoder is None:
            return "PROMPT_TUNING", {**common, "prompt_tuning_init": "RANDOM"}
        return "P_TUNING", {**common, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": self.encoder}


# ------------------------------------------------------------------ the longer sequence


def token_embedding(program: Program, who: str) -> Embedding:
    """The embedding of the batch's tokens. Raises `PassError` where there is none, or more than one."""
    found = []
    for node in program.graph.nodes:
        seen = view(node) if node.op == "call_function" else None
        if isinstance(seen, Embedding) and any(inputs_of(seen.ids)):
            found.append(seen)
    role = [e for e in found if program.roles.get(path_of(program, e)) == "embedding"]
    found = role or found
    if len(found) != 1:
        several = ", ".join(path_of(program, e) for e in found)
        raise PassError(
            f"{who}: {f'several embeddings read tokens ({several})' if found else 'no embedding reads tokens'}"
        )
    return found[0]


def path_of(program: Program, seen: Embedding) -> str:
    return own_path(program, seen.node, str(seen.weight.meta.get("name", "")).removesuffix(".weight"))


def inputs_of(node: fx.Node) -> list[fx.Node]:
    return [n for n in ancestors(node) if n.op == "placeholder" and n.meta["kind"] == "input"]


def end_of(node: fx.Node) -> fx.Node:
    """The last node of the embedding's own module: some scale what they looked up."""
    path = node.meta.get("path")
    while path and len(node.users) == 1 and (user := next(iter(node.users))).meta.get("path") == path:
        node = user
    return node


def lengthen(program: Program, seen: Embedding, last: fx.Node, extra: int, who: str) -> None:
    """Every length grows by ``extra``, but those of the batch and of the embedding; other inputs get values in front."""
    names = symbols_of(program, "sequence")
    kept = set(ancestors(last))
    for _, graph in program.graphs():
        for node in graph.nodes:
            if node not in kept and node.op != "output" and node.meta.get("kind") != "parameter":
                if node.op == "placeholder" and graph is program.graph:
                    continue
                renewed(node, plus(names, extra))
    for place in [n for n in program.graph.nodes if n.op == "placeholder" and n.meta["kind"] == "input"]:
        readers = [n for n in place.users if n not in kept]
        if not readers or not sequence_dims(place, names):
            continue
        longer = padded(program, place, extra, who)
        for reader in readers:
            reader.replace_input_with(place, longer)
