"""Models and plans that the proofs run over. Sizes are odd where that can hurt: 5 layers, a vocabulary of 251."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopar.emulate import IDEAL_LINK
from autopar.proof import ignoring, prove_module
from autopar.spec.job import Job

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, vocab_size=251)
KV = dict(num_key_value_heads=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, **KV},
    "falcon-40b": dict(
        type="falcon", hidden_size=64, num_hidden_layers=5, num_attention_heads=4, num_kv_heads=2, vocab_size=251,
        new_decoder_architecture=True,
    ),
    "falcon-7b": dict(
        type="falcon", hidden_size=64, num_hidden_layers=5, num_attention_heads=4, multi_query=True, parallel_attn=True,
        vocab_size=251, new_decoder_architecture=False,
    ),
    "bloom": dict(hidden_size=64, n_layer=5, n_head=4, vocab_size=251),
    "gpt2": dict(n_embd=64, n_layer=5, n_head=4, vocab_size=251, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "glm": {**SMALL, **KV, "head_dim": 16, "pad_token_id": 0},
    "mixtral": {**SMALL, **KV, "num_local_experts": 4},
    "gpt_neox": {**SMALL},
    "qwen3": {**SMALL, **KV, "head_dim": 16},
    "gemma2": {**SMALL, **KV, "head_dim": 16, "sliding_window": 8},
    "mistral": {**SMALL, **KV, "sliding_window": 8},
    "bert": {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": dict(d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, vocab_size=251, decoder_start_token_id=0),
    "vit": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, image_size=32, patch_size=8),
}  # fmt: skip

PLANS: list[dict[str, Any]] = [
    dict(tp=2),
    dict(pp=2, microbatch=1),
    dict(dp=2, zero=3),
    dict(pp=3, microbatch=1),
    dict(dp=2, zero=0, microbatch=1),
    dict(tp=2, sequence_parallel=True, recompute="full"),
    dict(dp=2, zero=1, microbatch=2),
    dict(dp=2, zero=3, tp=2, recompute="selective"),
    dict(dp=2, zero=2, microbatch=1, recompute="full"),
    dict(pp=2, tp=2, dp=2, zero=2, microbatch=1),
    dict(pp=2, schedule="interleaved1f1b", virtual_stages=2, microbatch=1),
    dict(pp=2, schedule="gpipe", microbatch=2, recompute="selective"),
    dict(tp=4),
    dict(pp=2, dp=2, zero=3, microbatch=1),
]


def source_of(name: str, **changes: Any) -> dict[str, Any]:
    config = {**FAMILIES[name], **changes}
    return {"hf": config.pop("type", name), "config": config}


def job_of(pins: dict[str, Any], sequences: int = 8, length: int = 16, **more: Any) -> Job:
    pins = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, **pins}
    devices = pins["tp"] * pins["pp"] * pins["dp"] * pins.get("cp", 1)
    cluster = {"name": "local-cpu", "devices_per_host": devices, "hosts": 1, "links": [IDEAL_LINK]}
    return Job.model_validate(
        {
            "cluster": cluster,
            "batch": {"sequences": sequences, "length": length},
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
            "pins": pins,
            **more,
        }
    )


def prove_source(source: dict[str, Any], pins: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The proof of a Hugging Face model under pins."""
    from autopar.models.batch import example_batch
    from autopar.models.load import build

    model = build(source, meta=False, dtype=torch.float64, seed=1)
    job = job_of(pins, **more)
    assert job.batch is not None
    batch = ignoring(example_batch(model, job.batch.sequences, job.batch.length, source=source))
    return prove_module(model, batch, job)


def prove_built(model: nn.Module, batch: dict[str, torch.Tensor], pins: dict[str, Any], **more: Any) -> dict[str, Any]:
    loss = more.pop("loss", None)
    first = next(iter(batch.values()))
    job = job_of(pins, sequences=int(first.shape[0]), length=int(first.shape[1]) if first.dim() == 2 else 1, **more)
    return prove_module(model, batch, job, loss=loss)


def assert_equal(proof: dict[str, Any]) -> None:
    errors = {k: proof[k] for k in ("loss_error", "gradient_error", "parameter_error")}
    assert proof["equal"], f"{errors}, worst {proof['worst']}, plan {proof['plan']}"
