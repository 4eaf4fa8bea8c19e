"""What is wrong with a job can often be told by arithmetic alone, before anything heavy is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import PlanError, SpecError
from autopar.spec.data import Data, NewTokenizer
from autopar.spec.job import Job, Pins
from autopar.spec.origin import ModelOrigin, place

AXES = ("pp", "dp", "cp", "tp")
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # Hugging Face's spellings of one thing
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INTERLEAVED = ("interleaved1f1b", "interleavedzerobubble")
_ZERO_BUBBLE = ("interleavedzerobubble", "zbvzerobubble", "dualpipev")
BYTES_AND_SPECIAL = 260  # bytes, and the four special tokens of blank infilling
_TWO_VIRTUAL = ("zbvzerobubble", "dualpipev")  # torch's V-shaped schedules have two stages on each rank


@dataclass(frozen=True)
class Sizes:
    """What a model's description tells of its sizes; None where it does not tell."""

    blocks: int | None = None
    heads: int | None = None
    hidden: int | None = None
    positions: int | None = None  # the longest sequence, where positions are learned


def sizes(origin: ModelOrigin) -> Sizes:
    """The sizes of a declared or a Hugging Face model, read without building it."""
    decoder = origin.decoder
    if decoder is not None:
        learned = decoder.max_length if decoder.positions == "learned" else None
        return Sizes(decoder.layers, decoder.heads, decoder.hidden, learned)
    if origin.hf is None:
        return Sizes()
    config = origin.config if origin.config is not None else _checkpoint_config(place(origin.hf))
    return Sizes(_first(config, _BLOCKS), _first(config, _HEADS), _first(config, _HIDDEN))


def _checkpoint_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{file}: not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    found = (config[key] for key in keys if isinstance(config.get(key), int))
    return next((value for value in found if value > 0), None)


def check_job(job: Job) -> None:
    """Raise SpecError or PlanError, with the arithmetic, where model, batch, cluster and pins cannot go together."""
    if job.model is None or job.cluster is None or job.batch is None:
        missing = [key for key in ("model", "cluster", "batch") if getattr(job, key) is None]
        raise SpecError(f"the job has no {' and no '.join(missing)}")
    _check_data(job.data, job.model)
    batch, uneven = job.batch, job.cluster.uneven
    check_pins(job.pins, sizes(job.model), job.cluster.devices, batch.sequences, batch.length, uneven=uneven)


def _check_data(data: Data, model: ModelOrigin) -> None:
    """Raise SpecError where the objective or the tokenizer cannot go with the model."""
    decoder, glm = model.decoder, data.objective.name == "glm"
    if glm and model.python is None and (decoder is None or decoder.positions != "rope_2d"):
        positions = f"has positions: {decoder.positions}" if decoder is not None else "is none"
        raise SpecError(
            f"data.objective: glm needs a declared model with positions: rope_2d (family: chatglm); {model} {positions}"
        )
    if decoder is None:
        return
    made = data.tokenizer.vocab if isinstance(data.tokenizer, NewTokenizer) else 0
    made = BYTES_AND_SPECIAL if glm and data.tokenizer == "bytes" else made
    if made > decoder.vocab:
        raise SpecError(f"data.tokenizer: it makes {made} tokens; the model's vocabulary has {decoder.vocab}")


def check_length(job: Job) -> None:
    """Raise SpecError where the batch's sequences are longer than the model's learned positions."""
    if job.model is None or job.batch is None:
        return
    positions = sizes(job.model).positions
    if positions is not None and job.batch.length > positions:
        length = job.batch.length
        raise SpecError(f"batch.length: {length} is more than the {positions} learned positions of {job.model}")


def check_pins(pins: Pins, model: Sizes, devices: int, sequences: int, length: int, *, uneven: bool = False) -> None:
    """Raise PlanError where pins contradict each other, the devices, the batch or the model. ``uneven``: hosts are unlike,
    and devices may stay unused."""
    degrees = pinned_degrees(pins, devices, uneven)
    _check_batch(pins, degrees, sequences, length)
    _check_model(pins, degrees, model)
    _check_schedule(pins, degrees, model)


def pinned_degrees(pins: Pins, devices: int, uneven: bool = False) -> dict[str, int]:
    """The degrees that are pinned, and the last one where the other three leave only one value for it."""
    degrees = {axis: degree for axis in AXES if (degree := getattr(pins, axis)) is not None}
    product = math.prod(degrees.values())
    written = " · ".join(f"{axis} {degree}" for axis, degree in degrees.items())
    if product > devices:
        raise PlanError(f"pins: {written} = {product} devices are needed, the cluster has {devices}")
    if uneven:
        return degrees
    if devices % product:
        raise PlanError(f"pins: {written} = {product} does not divide the cluster's {devices} devices")
    left = [axis for axis in AXES if axis not in degrees]
    if not left and product != devices:
        message = f"pins: {written} = {product} devices, the cluster has {devices}; every device must be used"
        raise PlanError(f"{message} (leave an axis open, or set cluster.hosts and cluster.devices_per_host)")
    if len(left) == 1:
        degrees[left[0]] = devices // product
    return degrees


def _check_batch(pins: Pins, degrees: dict[str, int], sequences: int, length: int) -> None:
    dp, cp, microbatch = degrees.get("dp"), degrees.get("cp", 1), pins.microbatch
    if dp is not None and dp > sequences:
        raise PlanError(f"pins: dp {dp} replicas are more than the {sequences} sequences of the batch")
    if dp is not None and sequences % dp:
        raise PlanError(f"pins: dp {dp} replicas do not divide the {sequences} sequences of the batch")
    if length % cp:
        raise PlanError(f"pins: cp {cp} does not divide the batch's length of {length}")
    if microbatch is None:
        return
    each = sequences // (dp or 1)
    if each % microbatch:
        held = f"{sequences} sequences / dp {dp} = {each}" if dp else f"{sequences} sequences"
        raise PlanError(f"pins: microbatch {microbatch} does not divide what a replica has of the batch: {held}")


def _check_model(pins: Pins, degrees: dict[str, int], model: Sizes) -> None:
    tp, pp = degrees.get("tp", 1), degrees.get("pp", 1)
    if model.heads is not None and model.heads % tp:
        if tp > model.heads:
            raise PlanError(f"pins: tp {tp} is more than the model's {model.heads} heads")
        if model.hidden is not None and model.hidden % tp:
            sizes = f"{model.heads} heads nor the hidden size {model.hidden}"
            raise PlanError(f"pins: tp {tp} divides neither the model's {sizes}")
    if model.blocks is not None and pp > model.blocks:
        raise PlanError(f"pins: pp {pp} stages are more than the model's {model.blocks} blocks")
    stages = pp * (pins.virtual_stages or 1)
    if model.blocks is not None and stages > model.blocks:
        product = f"pp {pp} · virtual_stages {pins.virtual_stages} = {stages}"
        raise PlanError(f"pins: {product} stages are more than the model's {model.blocks} blocks")


def _check_schedule(pins: Pins, degrees: dict[str, int], model: Sizes) -> None:
    schedule, virtual = pins.schedule, pins.virtual_stages
    if schedule in ("gpipe", "1f1b") and virtual is not None and virtual > 1:
        known = " or ".join((*_INTERLEAVED, *_TWO_VIRTUAL))
        raise PlanError(f"pins: virtual_stages {virtual} needs schedule {known}; {schedule} has one stage on each rank")
    if schedule in _TWO_VIRTUAL and virtual not in (None, 2):
        raise PlanError(f"pins: schedule {schedule} has virtual_stages 2, not {virtual}")
    pp = degrees.get("pp")
    if schedule in _ZERO_BUBBLE and (pins.zero or 0) > 1 and pp != 1 and degrees.get("dp") != 1:
        raise PlanError(
            f"pins: zero {pins.zero} does not go with schedule {schedule}: it computes gradients of weights after torch has "
            "divided the weights again, and loses some without a word; zero 0 and 1 do"
        )
    if schedule in _TWO_VIRTUAL and pp is not None and model.blocks is not None and 2 * pp > model.blocks:
        raise PlanError(f"pins: {schedule} has 2 · pp {pp} = {2 * pp} stages, more than the {model.blocks} blocks")
