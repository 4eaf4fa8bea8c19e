"""Adapters under a plan: proved on local ranks, saved and loaded by them, and frozen weights that cost nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_equal, job_of, prove_source, source_of

import autopar
from autopar.api import planned
from autopar.cluster.cluster import Cluster
from autopar.errors import CheckpointError
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.runtime.checkpoint import locate, metadata_of
from autopar.runtime.spawn import spawn

METHODS: dict[str, list[dict[str, Any]]] = {
    "dora": [{"dora": {"rank": 4, "targets": ["output"]}}],
    "ia3 and houlsby": [{"ia3": {}}, {"adapter": {"size": 6}}],
    "parallel": [{"adapter": {"size": 6, "style": "parallel"}}],
    "prompt_tuning": [{"prompt_tuning": {"tokens": 4}}],
    "prefix_tuning": [{"prefix_tuning": {"tokens": 4}}],
    "projected_prefix": [{"prefix_tuning": {"tokens": 4, "projection": 6}}],
    "llama_adapter": [{"llama_adapter": {"tokens": 4, "layers": 1}}],
    "several": [{"prompt_tuning": {"tokens": 4}}, {"bitfit": {}}, {"lora": {"rank": 4, "targets": ["output"]}}],
}
PLANS: list[dict[str, Any]] = [dict(tp=2), dict(pp=2, microbatch=2), dict(dp=2, zero=2, microbatch=2)]
SIZES = {"llama": dict(num_hidden_layers=2), "bloom": dict(n_layer=2), "falcon-7b": dict(num_hidden_layers=2)}


def turns() -> list[tuple[str, str, int]]:
    """Every method once, families and plans in turn: each family meets each plan."""
    return [(m, list(SIZES)[i % 3], (i + i // 3) % 3) for i, m in enumerate(METHODS)]


@pytest.mark.parametrize(("method", "family", "plan"), turns())
def test_an_adapted_model_equals_one_device(method: str, family: str, plan: int) -> None:
    source = source_of(family, **SIZES[family])
    assert_equal(prove_source(source, PLANS[plan], passes=METHODS[method], length=8, sequences=4))


# ------------------------------------------------------------------ saving and loading


def built(folder: Path, pins: dict[str, Any], passes: list[dict[str, Any]]) -> int:
    """A build folder of a tiny Llama with its batch; returns the number of its ranks."""
    source = source_of("llama", num_hidden_layers=2)
    model, job = build(source, meta=False, seed=1), job_of(pins, sequences=4, length=8)
    batch = example_batch(model, 4, 8, source=source)
    program = autopar.rewrite(autopar.trace(model, batch), passes)
    document = planned(program, Cluster.load(job.cluster), job)
    autopar.Executable(program, document, job).save(folder)
    torch.save(batch, folder / "batch.pt")
    return document.plan.mesh.devices


def trained(folder: str) -> tuple[float, int, int, int]:
    """Two steps, both kinds of files; the next loss, and the bytes of parameters, gradients and optimizer state."""
    from autopar.runtime.engine import Engine

    engine = Engine(folder)
    batch = torch.load(f"{folder}/batch.pt")
    engine.step(batch)
    engine.accumulate(batch)
    gradients = sum(h.grad.nbytes for h in engine.held if h.grad is not None)
    engine.apply()
    engine.save(f"{folder}/checkpoints", trainable_only=True)
    engine.save_adapter(f"{folder}/adapter")
    state = sum(t.nbytes for s in engine.optimizer.state for k, t in s.items() if k != "step")
    parameters = sum(h.local.nbytes for h in engine.held if h.entry.trainable)
    return engine.accumulate(batch), parameters, gradients, state


def resumed(folder: str, other: str, checkpoint: bool) -> float:
    """The loss after reading what ranks under another plan wrote."""
    from autopar.runtime.engine import Engine

    engine = Engine(folder)
    engine.load(f"{other}/checkpoints") if checkpoint else engine.load_adapter(f"{other}/adapter")
    return engine.accumulate(torch.load(f"{folder}/batch.pt"))


LORA = [{"lora": {"rank": 4, "targets": ["query", "output"]}}]


@pytest.mark.parametrize(
    ("first", "second", "passes"),
    [
        (dict(tp=2, microbatch=2), dict(pp=2, microbatch=1), [{"dora": {"rank": 4}}, {"ia3": {}}]),
        (
            dict(pp=2, microbatch=1),
            dict(tp=2, dp=2, zero=3, microbatch=1),
            [{"prefix_tuning": {"tokens": 3, "projection": 8}}],
        ),
        (dict(dp=2, zero=3), dict(tp=2, pp=2, microbatch=2), [{"prompt_tuning": {"tokens": 3}}, {"bitfit": {}}]),
        (
            dict(tp=2, pp=2, microbatch=1),
            dict(dp=2, zero=1),
            [{"adapter": {"size": 4}}, {"llama_adapter": {"tokens": 3}}],
        ),
    ],
    ids=str,
)
def test_every_adapters_checkpoint_moves_to_another_plan(
    first: dict[str, Any], second: dict[str, Any], passes: list[dict[str, Any]], tmp_path: Path
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    loss = spawn(trained, built(a, first, passes), str(a))[0][0]
    assert abs(spawn(resumed, built(b, second, passes), str(b), str(a), True)[0] - loss) < 1e-6 * loss


def test_an_adapter_moves_between_plans_and_its_frozen_weights_have_no_gradient_and_no_state(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    loss, parameters, gradients, state = spawn(trained, built(a, dict(tp=2, microbatch=2), LORA), str(a))[0]
    assert gradients == parameters and state == 2 * parameters  # AdamW's two moments, in float32 like the parameters
    ranks = built(b, dict(dp=2, zero=2, microbatch=2), LORA)
    for checkpoint in (True, False):
        assert abs(spawn(resumed, ranks, str(b), str(a), checkpoint)[0] - loss) < 1e-6 * loss
    stored = metadata_of(locate(a / "checkpoints")).state_dict_metadata
    assert stored and all(".lora_" in name for name in stored), "frozen weights were written"
    executable = autopar.load(a)
    executable.save_adapter(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (a / "adapter" / name).read_bytes()


def test_a_folder_that_was_not_trained_has_no_adapter_to_save(tmp_path: Path) -> None:
    built(tmp_path / "a", dict(tp=1), LORA)
    with pytest.raises(autopar.AutoparError, match="not trained yet"):
        autopar.load(tmp_path / "a").save_adapter(tmp_path / "adapter")


def test_a_folder_without_adapters_says_so(tmp_path: Path) -> None:
    from autopar.runtime.engine import Engine

    built(tmp_path / "a", dict(tp=1), [])
    with pytest.raises(CheckpointError, match="no adapter"):
        Engine(tmp_path / "a").save_adapter(tmp_path / "adapter")
