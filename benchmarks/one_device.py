"""One device: the emitted training step against the eager model, for two Hugging Face models and a declarative one.

One step is forward, backward and AdamW. Both sides hold the same weights and compute the same loss.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import LR, Row, Step, Times, compared, executable, interleaved, options, report
from _models import text
from torch import nn

from autopar.ir.objective import Objective
from autopar.models.load import build
from autopar.runtime.engine import Engine
from autopar.runtime.spawn import spawn

SEQUENCES, LENGTH, VOCABULARY = 4, 128, 4096
LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": False}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
DECLARED = {"family": "llama", "layers": 4, "hidden": 256, "ffn": 704, "heads": 4, "kv_heads": 2, "vocab": VOCABULARY}
MODELS = {
    "Hugging Face Llama, 4 layers, width 256": {"config": LLAMA},
    "Hugging Face GPT-2, 4 layers, width 256": {"config": GPT2},
    "declared Llama, 4 layers, width 256": {"declared": DECLARED},
}


def model_of(name: str) -> nn.Module:
    found: dict[str, Any] = MODELS[name]
    if "declared" in found:
        return build(found["declared"], meta=False)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields = dict(found["config"])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).train()


def batch() -> dict[str, torch.Tensor]:
    return text(SEQUENCES, LENGTH, VOCABULARY)


def eager(module: nn.Module) -> Step:
    """The model as it is, its cross-entropy, and torch's AdamW."""
    objective, given = Objective(module), batch()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step() -> float:
        total, count = objective(given)
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def rank_times(name: str, folder: str, rounds: int) -> Times:
    engine, given = Engine(folder), batch()
    return interleaved({"ours": lambda: engine.step(given), "eager": eager(model_of(name))}, rounds)


def measured(name: str, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        executable(model_of(name), batch(), Path(folder), microbatch=SEQUENCES)
        (times,) = spawn(rank_times, 1, name, folder, rounds, timeout=600.0)
    return compared(f"{name}, against eager", times, "ours", "eager", 1.02)


def main() -> int:
    given = options(__doc__, rounds=40)
    return report([measured(name, given.rounds) for name in MODELS], given.check)


if __name__ == "__main__":
    sys.exit(main())
