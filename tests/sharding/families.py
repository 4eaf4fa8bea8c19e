"""Tiny models of many families, traced as training graphs: (loss_sum, count), batch 3, length 12."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F

BATCH, LENGTH, VOCAB = 3, 12, 96
HIDDEN = 48


class CausalLoss(nn.Module):
    """Summed next-token loss and the number of labels, of a Hugging Face decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        target = labels[:, 1:]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1), reduction="sum")
        return loss, (target != -100).sum()


class Seq2SeqLoss(nn.Module):
    """Summed loss of an encoder-decoder that reads what it is to write."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=input_ids, decoder_input_ids=labels, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


class MaskedLoss(nn.Module):
    """Summed loss of an encoder, classes in dim 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=input_ids).logits
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum"), (labels != -100).sum()


class ImageLoss(nn.Module):
    """Summed loss of an image classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(pixel_values)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()


class Conv(nn.Module):
    """Convolutions with group and batch norm, pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.bn = nn.BatchNorm2d(24)
        self.block = nn.Conv2d(24, 24, 3, padding=1, groups=6)
        self.gn = nn.GroupNorm(4, 24)
        self.head = nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        x = x + F.silu(self.gn(self.block(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(nn.Module):
    """torch's own transformer encoder over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.encoder(self.embed(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


class Handmade(nn.Module):
    """A decoder as one writes it by hand: fused projection, einsum attention, gated MLP, rms norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.gate_up = nn.Linear(HIDDEN, 192)
        self.down = nn.Linear(96, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(input_ids)
        b, s, h = x.shape
        q, k, v = (t.view(b, s, 4, h // 4) for t in self.qkv(self.norm(x)).split(h, -1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (h // 4) ** -0.5
        mask = torch.ones(s, s, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, h))
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        x = x + self.down(F.gelu(gate) * up)
        logits = F.linear(self.norm(x), self.embed.weight)
        logp = logits.log_softmax(-1)
        return F.nll_loss(logp.flatten(0, 1), labels.flatten(), reduction="sum"), (labels >= 0).sum()


def _hf(kind: str, auto: str, **config: Any) -> nn.Module:
    import transformers

    attention = config.pop("attention", "sdpa")
    made = transformers.AutoConfig.for_model(kind, **config)
    made._attn_implementation = attention
    if "experts" in config:
        made._experts_implementation = config["experts"]
    return getattr(transformers, auto).from_config(made, attn_implementation=attention)


def _decoder(kind: str, **config: Any) -> CausalLoss:
    base = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CausalLoss(_hf(kind, "AutoModelForCausalLM", **{**base, **config}))


_LLAMA = {"intermediate_size": 96, "num_key_value_heads": 2}
_DRY = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _decoder("llama", **_LLAMA),
    "qwen3": lambda: _decoder("qwen3", head_dim=12, **_LLAMA),
    "mistral": lambda: _decoder("mistral", **_LLAMA),
    "gemma2": lambda: _decoder("gemma2", head_dim=12, attention="eager", **_LLAMA),
    "mixtral": lambda: _decoder("mixtral", num_local_experts=4, experts="batched_mm", **_LLAMA),
    "glm": lambda: _decoder("glm", head_dim=12, pad_token_id=0, **_LLAMA),
    "falcon_7b": lambda: _decoder("falcon", multi_query=True, parallel_attn=True, **_DRY),
    "falcon_40b": lambda: _decoder("falcon", new_decoder_architecture=True, num_kv_heads=2, **_DRY),
    "falcon_alibi": lambda: _decoder("falcon", alibi=True, multi_query=False, parallel_attn=False, **_DRY),
    "bloom": lambda: _decoder("bloom", n_head=4, n_layer=2, attention="eager", **_DRY),
    "gpt_neox": lambda: _decoder("gpt_neox", intermediate_size=96, **_DRY),
    "gpt2": lambda: _decoder("gpt2", n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "bert": lambda: MaskedLoss(
        _hf(
            "bert",
            "AutoModelForMaskedLM",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
    "t5": lambda: Seq2SeqLoss(
        _hf(
            "t5",
            "AutoModelForSeq2SeqLM",
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=12,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            attention="eager",
        )
    ),
    "vit": lambda: ImageLoss(
        _hf(
            "vit",
            "AutoModelForImageClassification",
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=24,
            patch_size=8,
        )
    ),
    "conv": lambda: ImageLoss(Conv()),
    "encoder": Encoder,
    "handmade": Handmade,
}


def batch(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, ImageLoss):
        return {
            "pixel_values": torch.randn(BATCH, 3, 24, 24, dtype=torch.float64),
            "labels": torch.randint(2, (BATCH,)),
        }
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": torch.randint(1, VOCAB, (BATCH, LENGTH))}


@cache
def trace(name: str) -> fx.Graph:
    """The training graph of a family in float64, static and flat: placeholders carry their kind and tensor."""
    torch.manual_seed(0)
    model = FAMILIES[name]().double().train()
    made = batch(model)
    exported = torch.export.export(model, (), made, strict=False)
    graph, env = fx.Graph(), {}
    kinds = {"PARAMETER": "parameter", "BUFFER": "buffer", "CONSTANT_TENSOR": "constant", "USER_INPUT": "input"}
    tensors = {**exported.state_dict, **exported.constants}
    fresh = iter(made.values())
    for spec, node in zip(
        exported.graph_signature.input_specs, exported.graph.find_nodes(op="placeholder"), strict=True
    ):
        env[node] = graph.node_copy(node)
        value = next(fresh) if spec.kind.name == "USER_INPUT" else tensors[spec.target]
        env[node].meta.update(kind=kinds[spec.kind.name], name=spec.target, tensor=value.detach())
    graph.output(_inline(exported.graph_module, graph, env))
    return graph


def _inline(module: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any]) -> Any:
    """Copy the operators of ``module`` behind those of ``graph``: regions opened, what only export needs left out."""
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env.get(n, n))
        if node.op == "output":
            return args[0]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            inner = getattr(module, node.args[1].target)
            held = dict(zip(inner.graph.find_nodes(op="placeholder"), args[2:], strict=True))
            env[node] = _inline(inner, graph, held)
        elif node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            env[node] = args[0][args[1]]  # of a region that was opened
        elif "_assert_" not in str(node.target):
            args = map_aggregate(args, _double)
            env[node] = graph.call_function(_functional(node.target), args, map_aggregate(kwargs, _double))
            env[node].meta = dict(node.meta)
    return None


def _double(value: Any) -> Any:
    """Models cast to float32 by name; the proof is in float64."""
    return torch.float64 if value == torch.float32 and isinstance(value, torch.dtype) else value


def _functional(target: Any) -> Any:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    name = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""
    if not name.endswith("_") or name.startswith("_"):
        return target
    return getattr(getattr(torch.ops.aten, name[:-1]), target._overloadname)
