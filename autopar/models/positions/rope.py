"""Rotary positions (Su et al. 2021): Llama, Falcon, GPT-NeoX, ChatGLM2."""

from __future__ import annotations

from autopar.models.rotary import Rotary
from autopar.spec.model import DecoderSpec


def make(spec: DecoderSpec) -> Rotary:
    """On the rope's fraction of each head."""
    return Rotary.of(spec)
