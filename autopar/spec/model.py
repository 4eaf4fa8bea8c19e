"""A decoder described by data: the sizes, norms, positions and biases that make one family differ from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from autopar.errors import SpecError
from autopar.spec.base import Count, Flag, Fraction, Positive, Real, Spec, build
from autopar.spec.family import families, load_family
from autopar.spec.source import Source

GATED = {"swiglu", "geglu", "geglu_tanh", "reglu"}
Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"]


class RopeScaling(Spec):
    """Llama 3.1's stretch of the low frequencies (`rope_type: llama3`) beyond ``original_length``."""

    factor: Positive
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    original_length: Count


class Rope(Spec):
    """Rotary positions: ``fraction`` of each head is rotated, in pairs (i, i + half) or, interleaved, (2i, 2i + 1)."""

    theta: Positive = 10_000.0
    fraction: Annotated[Real, Field(gt=0, le=1)] = 1.0
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


class Biases(Spec):
    """Which projections add a bias; ``norm`` is LayerNorm's."""

    qkv: Flag = False
    output: Flag = False
    up: Flag = False
    down: Flag = False
    norm: Flag = False
    head: Flag = False


class Dropout(Spec):
    """Probabilities: after the embedding, on the attention weights, and on what each sublayer adds to the residual."""

    embedding: Fraction = 0.0
    attention: Fraction = 0.0
    hidden: Fraction = 0.0


class Initializer(Spec):
    """Normal weights of deviation ``std``; ``scale_residual``: / √(2·layers) where a sublayer ends (GPT-2)."""

    std: Positive = 0.02
    scale_residual: Flag = False


class DecoderSpec(Spec):
    """One decoder. Fields left out come from the family; ``ffn`` of a plain MLP is 4·hidden, ``kv_heads`` is heads.

    block: ``sequential``; ``parallel`` (Falcon 7B: one norm feeds attention and MLP); ``parallel_two_norms`` (Falcon
    40B); ``scaled_norm_residual`` (ChatGLM: the residual is the norm's output times √(2·layers)).
    qkv: ``separate``; ``grouped``, one matrix laid out (kv_head, [queries, key, value], head_dim), as in BLOOM and
    Falcon; ``concatenated``, one matrix q | k | v, as in ChatGLM2 and MPT.
    """

    family: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count = 0
    head_dim: Count = 0  # always set by _derived where hidden and heads are right
    ffn: Count
    vocab: Count
    tokenizer: str = ""  # how text becomes ids, in words
    max_length: Count
    tied: Flag
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: Positive = 1e-5
    activation: Activation
    fused_gate_up: Flag = False
    positions: Literal["none", "learned", "rope", "rope_2d", "alibi"]
    rope: Rope = Rope()
    qkv: Literal["separate", "grouped", "concatenated"] = "separate"
    query_key_norm: Flag = False
    block: Literal["sequential", "parallel", "parallel_two_norms", "scaled_norm_residual"] = "sequential"
    embedding_norm: Flag = False
    final_norm: Flag = True
    softmax_float32: Flag = False
    bias: Biases = Biases()
    dropout: Dropout = Dropout()
    initializer: Initializer = Initializer()

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def rotary_dim(self) -> int:
        """How many entries of a head are rotated (by one position each, in `rope_2d` by one position per half)."""
        return int(self.head_dim * self.rope.fraction)

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, data: Any) -> Any:
        """Fill what follows from other fields; leave wrong types to their own errors."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        hidden, heads = data.get("hidden"), data.get("heads")
        if data.get("kv_heads") is None and heads is not None:
            data["kv_heads"] = heads
        if _positive(hidden) and _positive(heads) and data.get("head_dim") is None:
            if hidden % heads:
                raise ValueError(
                    f"has heads: {heads}, which do not divide hidden: {hidden}; give a divisor, or head_dim as well"
                )
            data["head_dim"] = hidden // heads
        if _positive(hidden) and data.get("ffn") is None and data.get("activation") not in GATED:
            data["ffn"] = 4 * hidden
        return data

    @model_validator(mode="after")
    def _consistent(self) -> DecoderSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"has kv_heads: {self.kv_heads}, which do not divide heads: {self.heads}")
        pairs = {"rope": 2, "rope_2d": 4}.get(self.positions, 1)
        if self.positions in ("rope", "rope_2d") and (self.rotary_dim < pairs or self.rotary_dim % pairs):
            raise ValueError(
                f"rotates {self.rotary_dim} of head_dim: {self.head_dim} entries; positions: {self.positions} needs a "
                f"multiple of {pairs}"
            )
        if self.fused_gate_up and not self.gated:
            raise ValueError(
                f"has fused_gate_up, but {self.activation} has no gate (gated: {', '.join(sorted(GATED))})"
            )
        return self


def resolve(model: Mapping[str, Any], where: str = "model") -> DecoderSpec:
    """The spec of ``{family: …, layers: …, …}``: the family's defaults under the given fields.

    Raises SpecError that names the field (unknown, missing, wrong or at odds with another) or the nearest family.
    """
    name = model.get("family")
    if name is None:
        raise SpecError(f"{where}: missing field 'family' (families here: {', '.join(families())})")
    family = load_family(str(name), where)
    if not family.defaults:
        raise SpecError(
            f"{where}: family '{name}' only names roles of Hugging Face models; use {{hf: …}} for the model"
        )
    return build(DecoderSpec, Source(merge(family.defaults, model), where), "the decoder")


def merge(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``defaults``; mappings are merged key by key, everything else is replaced."""
    merged = dict(defaults)
    for key, value in given.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0
