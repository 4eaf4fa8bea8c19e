"""A job: the spec that names all others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import StringConstraints, field_validator, model_validator

from autopar.spec.base import Count, Flag, Fraction, NonNegative, Positive, Spec, Whole
from autopar.spec.cluster import ClusterSpec, read_cluster
from autopar.spec.data import Data
from autopar.spec.origin import ModelOrigin, read_origin
from autopar.spec.quantity import short
from autopar.spec.source import Source

Schedule = Literal["gpipe", "1f1b", "interleaved1f1b", "interleavedzerobubble", "zbvzerobubble", "dualpipev"]
Beta = Fraction
Placed = Annotated[str, StringConstraints(pattern=r"^(R|S\(\d+(\|\d+(,\d+)*)?\))$")]


class Batch(Spec):
    """One optimizer step over the whole cluster: ``sequences`` of ``length`` tokens each."""

    sequences: Count
    length: Count

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Optimizer(Spec):
    """torch's AdamW or SGD. ``state``: the dtype of its moments. ``warmup``: steps before the schedule. ``rounding``: of
    updated parameters that are kept in bfloat16."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: NonNegative = 1e-4
    weight_decay: NonNegative = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: Fraction = 0.0
    state: Literal["float32", "bfloat16", "float64"] = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Whole = 0
    final: Fraction = 0.0  # the share of lr that linear and cosine end at

    @model_validator(mode="after")
    def _own_options(self) -> Optimizer:
        foreign = {"adamw": {"momentum"}, "sgd": {"betas", "eps"}}[self.name] & self.model_fields_set
        changed = sorted(f for f in foreign if getattr(self, f) != type(self).model_fields[f].default)
        if changed:
            raise ValueError(f"'{self.name}' has no {' and no '.join(changed)}")
        if self.rounding == "stochastic" and self.state != "float32":
            raise ValueError(f"stochastic rounding computes updates in float32, not in the state's {self.state}")
        return self


class Train(Spec):
    """The run. ``clip``: the largest global gradient norm. ``checkpoint_every``: steps; 0 is never."""

    steps: Count = 100
    clip: Positive | None = None
    seed: Whole = 0
    checkpoint_every: Whole = 0


class Pins(Spec):
    """Decisions fixed by hand; None leaves one to the solver. ``microbatch``: sequences per replica per micro-batch.

    ``dp_shard``: among how many devices ZeRO divides; ``dp_replicate``: how many times that is done; dp is the product.
    ``context``: how attention goes over cp: keys and values round a ring, or heads split by an all-to-all.
    ``placements``: globs of parameters and where they live along tp, ``R`` or ``S(0)``; a block's instances are alike.
    """

    tp: Count | None = None
    pp: Count | None = None
    dp: Count | None = None
    dp_replicate: Count | None = None
    dp_shard: Count | None = None
    cp: Count | None = None
    context: Literal["ring", "all_to_all"] | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    microbatch: Count | None = None
    schedule: Schedule | None = None
    virtual_stages: Count | None = None
    sequence_parallel: Flag | None = None
    recompute: (
        Literal["none", "selective", "full", "custom_1", "custom_2", "custom_3", "custom_4", "custom_5"] | None
    ) = None
    placements: dict[str, Placed] | None = None

    @model_validator(mode="before")
    @classmethod
    def _hybrid(cls, data: Any) -> Any:
        """Two of dp, dp_replicate and dp_shard say the third."""
        if not isinstance(data, dict):
            return data
        dp, replicate, shard = (data.get(k) for k in ("dp", "dp_replicate", "dp_shard"))
        if not all(v is None or isinstance(v, int) and v > 0 for v in (dp, replicate, shard)):
            return data
        if dp is None:
            return data | {"dp": replicate * shard} if replicate and shard else data
        for name, degree in (("dp_replicate", replicate), ("dp_shard", shard)):
            if degree and dp % degree:
                raise ValueError(f"{name} {degree} does not divide dp {dp}")
        if replicate and shard and replicate * shard != dp:
            raise ValueError(f"dp_replicate {replicate} × dp_shard {shard} is {replicate * shard}, not dp {dp}")
        return data

    @model_validator(mode="after")
    def _divides_something(self) -> Pins:
        shard = self.dp_shard or (self.dp // self.dp_replicate if self.dp and self.dp_replicate else None)
        if self.zero == 0 and shard is not None and shard > 1:
            raise ValueError(f"zero 0 divides nothing; dp_shard {shard} goes with zero 1, 2 or 3")
        if self.zero and shard == 1 and (self.dp or 1) > 1 and self.cp in (None, 1):
            raise ValueError(f"dp_shard 1 divides nothing, which is zero 0, not zero {self.zero}")
        if self.context and self.cp == 1:
            raise ValueError(
                f"context {self.context} goes over cp, which is pinned to 1; a larger cp, or no context, would be right"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel splits over tp, which is pinned to 1; a larger tp, or false, would be right"
            )
        return self


class Search(Spec):
    """How long to search, and the share of each device's memory that a plan leaves free."""

    seconds: Positive = 60.0
    memory_margin: Fraction = 0.05


class Job(Spec):
    """All that `autopar` is asked to do. In Python every field is optional; a file names model, cluster and batch."""

    name: str = ""
    model: ModelOrigin | None = None
    cluster: ClusterSpec | None = None
    batch: Batch | None = None
    passes: tuple[dict[str, dict[str, Any]], ...] = ()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    data: Data = Data()
    pins: Pins = Pins()
    search: Search = Search()

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, ModelOrigin) else read_origin(Source(value, "model"))

    @field_validator("cluster", mode="before")
    @classmethod
    def _cluster(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, ClusterSpec) else read_cluster(Source(value, "cluster"))

    @field_validator("passes", mode="before")
    @classmethod
    def _passes(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"must be a list such as [{{lora: {{rank: 8}}}}, flash_attention], not {short(value)}")
        return tuple(_entry(item) for item in value)

    @field_validator("optimizer", "train", "data", "pins", "search", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value

    def dump(self) -> str:
        """The job as YAML text that reads back equal, with the cluster written out in SI units."""
        data = self.model_dump(mode="json", exclude_none=True)
        data["data"] = self.data.model_dump(mode="json", exclude_defaults=True)
        kept = {key: value for key, value in data.items() if value not in ("", {}, [])}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)


def _entry(item: Any) -> Any:
    """``{lora: {rank: 8}}``, ``{flash_attention: {}}`` or just ``flash_attention``."""
    if isinstance(item, str):
        return {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        found = f"{len(item)} keys ({', '.join(map(str, item))})" if isinstance(item, dict) else short(item)
        raise ValueError(f"must hold one pass in each entry, such as 'lora: {{rank: 8}}'; one entry has {found[:100]}")
    name, options = next(iter(item.items()))
    return {name: {} if options is None else options}
