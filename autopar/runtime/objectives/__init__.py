"""Objectives: a window of tokens becomes a row of the batch. A file here is one of them: its ``make(…)`` returns it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from autopar.errors import AutoparError
from autopar.runtime.objectives.base import IGNORED, Objective, Row, Window
from autopar.runtime.seeds import seed_of
from autopar.spec.data import Data

__all__ = ["IGNORED", "Objective", "Row", "Window", "example", "named", "objective_of", "stack"]


def objective_of(data: Data, id_of: Callable[[str], int]) -> Objective:
    """The job's objective; ``id_of`` knows its special tokens."""
    module = importlib.import_module(f"{__name__}.{data.objective.name}")
    return module.make(data.objective, data.documents == "separate", id_of)


def stack(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows as a batch: every value with the rows first."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def named(model: nn.Module) -> frozenset[str] | None:
    """What a model's forward takes by name; None where it takes anything."""
    found = inspect.signature(model.forward).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in found.values()) else frozenset(found)


def example(data: Data, batch: Mapping[str, torch.Tensor], takes: frozenset[str] | None) -> dict[str, torch.Tensor]:
    """An example batch as the job's objective makes it, from one of plain text: random ``input_ids`` (rows, length).

    ``takes``: what the model's forward takes by name (None: anything); `position_ids` are left out where it takes none.
    AutoparError where the batch is none of tokens and labels.
    """
    if data.plain:
        return dict(batch)
    if set(batch) != {"input_ids", "labels"}:
        what = (
            f"data.objective: {data.objective.name}"
            if data.objective.name != "causal_lm"
            else "data.documents: separate"
        )
        raise AutoparError(f"{what} needs a decoder of tokens; this model's batch has {', '.join(batch)}")
    ids = batch["input_ids"].numpy()
    made = objective_of(data, lambda token: 0)
    length = ids.shape[1]
    rows = []
    for i, row in enumerate(ids):
        draw = np.random.default_rng(seed_of(0, f"example/{i}"))
        n = made.window(length)
        documents = np.arange(n) * 3 // max(n, 1)  # three in a row
        rows.append(made.row(Window(row[:n], np.ones(n, bool), documents), length, draw))
    found = stack(rows)
    kept = {"input_ids", "labels", *made.inputs} | ({"position_ids"} if data.documents == "separate" else set())
    if takes is not None and "position_ids" not in takes:
        if "position_ids" in made.inputs:
            raise AutoparError(f"data.objective: {data.objective.name} needs a model that takes position_ids")
        kept.discard("position_ids")
    return {name: value for name, value in found.items() if name in kept}
