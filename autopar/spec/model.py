"""A decoder described by data: the sizes, norms, positions and biases that make one family differ from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from autopar.errors import SpecError, suggestion
from autopar.spec import parts
from autopar.spec.base import Count, Flag, Fraction, NonNegative, Positive, Real, Spec, Whole, build
from autopar.spec.family import families, load_family
from autopar.spec.quantity import short
from autopar.spec.source import Source

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
"""Gated units by the names of Shazeer 2020, and the activation of their gate; `gated: true` gates any other."""


def _activation(name: str) -> str:
    known = (*parts.parts("activations"), *GATED)
    if name not in known:
        raise ValueError(f"is {short(name)}, which is unknown{suggestion(name, known)} (one of: {', '.join(known)})")
    return name


def _normed(value: object) -> object:
    return {True: "head", False: "none"}[value] if isinstance(value, bool) else value


class RopeScaling(Spec):
    """How rotary positions stretch beyond ``original_length`` (default: the model's max_length), by a part of `scalings`.

    ``linear`` and ``dynamic`` (NTK) read factor; ``llama3`` also the frequency factors; ``yarn`` also the betas,
    ``attention_factor`` (default: 0.1 ln factor + 1) and ``truncate`` (whole dims bound its ramp).
    """

    kind: parts.Scaling = "llama3"
    factor: Positive
    original_length: Count | None = None
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    truncate: Flag = True


class Rope(Spec):
    """Rotary positions: ``fraction`` of each head is rotated, in pairs (i, i + half) or, interleaved, (2i, 2i + 1)."""

    theta: Positive = 10_000.0
    fraction: Annotated[Real, Field(gt=0, le=1)] = 1.0
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


class Biases(Spec):
    """Which projections add a bias; ``query``, ``key`` and ``value`` each as ``qkv`` unless given; ``norm``: LayerNorm's."""

    qkv: Flag = False
    query: Flag | None = None
    key: Flag | None = None
    value: Flag | None = None
    output: Flag = False
    up: Flag = False
    down: Flag = False
    norm: Flag = False
    head: Flag = False

    def of(self, projection: str) -> bool:
        """Whether the projection ``query``, ``key`` or ``value`` has a bias."""
        own: bool | None = {"query": self.query, "key": self.key, "value": self.value}[projection]
        return self.qkv if own is None else own


class Experts(Spec):
    """A mixture of ``experts`` gated MLPs of inner size ``ffn`` (default: the model's), ``top`` of them for each token.

    score: of the router's logits, before the top are taken; ``normalize``: the top scores are divided by their sum, then
    multiplied by ``scale``. shared: inner size of an expert that serves every token, under a sigmoid gate of its own
    with ``shared_gate``. The first ``dense_layers`` blocks have one MLP of the model's ffn. dispatch names the part that
    computes the experts.
    """

    experts: Count
    top: Count
    ffn: Count | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: Flag = True
    scale: Positive = 1.0
    shared: Whole = 0
    shared_gate: Flag = False
    dense_layers: Whole = 0
    dispatch: parts.Dispatch = "routed"

    @model_validator(mode="after")
    def _chosen(self) -> Experts:
        if self.top > self.experts:
            raise ValueError(
                f"chooses top: {self.top} of experts: {self.experts}; at most {self.experts} can be chosen"
            )
        if self.shared_gate and not self.shared:
            raise ValueError("has a shared_gate, but no shared expert; give its inner size as shared")
        return self


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

    positions, norm, activation, qkv (how queries, keys and values lie in their matrices) and block name parts: files in
    `autopar/models/{positions,norms,activations,projections,blocks}/`, which say what each is.
    norm_offset is added to a norm's weight (Gemma: 1). query_key_norm: over each ``head``, or over the whole
    ``projection`` (OLMo 2). window: a query sees this many keys, itself included, in the layers where window_pattern
    (repeated over the layers) is true. soft_cap c of scores and head_soft_cap of logits: c · tanh(x / c).
    embedding_gradient: the share of the gradient that reaches the embedding (GLM-130B). z_loss: coefficient of
    (log Z)² per label (PaLM). Scales multiply: attention_scale the scores (default 1 / √head_dim), residual_scale what a
    sublayer adds, embedding_scale the embedding, logit_scale the logits; alibi_scaled: ALiBi comes before the scores' scale.
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
    byte_fallback: Flag | None = None  # whether every text has ids, unknown characters as their bytes
    max_length: Count
    tied: Flag
    norm: parts.Norm
    norm_eps: Positive = 1e-5
    norm_offset: Real = 0.0
    activation: Annotated[str, AfterValidator(_activation)]
    gated: Flag = False
    fused_gate_up: Flag = False
    positions: parts.Positions
    rope: Rope = Rope()
    alibi_scaled: Flag = False
    qkv: parts.Projection = "separate"
    qkv_clip: Positive | None = None
    query_key_norm: Annotated[Literal["none", "head", "projection"], BeforeValidator(_normed)] = "none"
    window: Count | None = None
    window_pattern: tuple[Flag, ...] = (True,)
    soft_cap: Positive | None = None
    attention_scale: Positive | None = None
    block: parts.Block = "sequential"
    residual_scale: Positive = 1.0
    embedding_norm: Flag = False
    embedding_scale: Positive | Literal["sqrt_hidden"] = 1.0
    embedding_gradient: Annotated[Real, Field(gt=0, le=1)] = 1.0
    final_norm: Flag = True
    logit_scale: Positive = 1.0
    head_soft_cap: Positive | None = None
    softmax_float32: Flag = False
    moe: Experts | None = None
    bias: Biases = Biases()
    dropout: Dropout = Dropout()
    initializer: Initializer = Initializer()
    z_loss: NonNegative = 0.0

    @property
    def rotary_dim(self) -> int:
        """How many entries of a head are rotated (by one position each, in `rope_2d` by one position per half)."""
        return int(self.head_dim * self.rope.fraction)

    def windowed(self, layer: int) -> int | None:
        """The window of layer ``layer`` (from 0), or None where it sees everything before it."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] else None

    def mixes(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) has experts."""
        return self.moe is not None and layer >= self.moe.dense_layers

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
        activation = data.get("activation")
        if isinstance(activation, str) and activation in GATED and data.get("gated") is None:
            data["gated"] = True
        if _positive(hidden) and data.get("ffn") is None and data.get("gated") in (None, False):
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
        if not self.gated and (self.fused_gate_up or self.activation in GATED or self.moe is not None):
            what = "fused_gate_up" if self.fused_gate_up else "moe" if self.moe is not None else "gated: false"
            raise ValueError(
                f"has {what}, but {self.activation} has no gate (gated: {', '.join(sorted(GATED))}; or gated: true)"
                if what != "gated: false"
                else f"has gated: false, but {self.activation} is a gated unit; name its activation alone"
            )
        if self.qkv != "separate" and len({self.bias.of(p) for p in ("query", "key", "value")}) > 1:
            raise ValueError(f"has biases of query, key and value that differ; qkv: {self.qkv} is one matrix for all")
        if not self.window_pattern:
            raise ValueError("has an empty window_pattern; give at least one of true, false")
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
