"""Half precision while training: the loss scale of float16, its skips on all ranks, and stochastic rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import PlanError, SpecError
from autopar.runtime.manifest import ParameterEntry
from autopar.runtime.optim import Optimizer
from autopar.runtime.parameters import Held, Shard
from autopar.runtime.rounding import bits, round_into
from autopar.runtime.scaler import LossScale
from autopar.runtime.spawn import spawn
from autopar.spec.job import Job
from autopar.spec.job import Optimizer as Options

# ------------------------------------------------------------------ the loss scale


def test_the_scale_moves_as_that_of_torchs_grad_scaler():
    ours = LossScale(patience=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=ours.value, growth_interval=3)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        finite = bool(torch.rand((), generator=random) < 0.7)
        theirs.scale(torch.zeros(()))  # makes its tensors
        weight.grad = torch.tensor([1.0 if finite else float("inf")])
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.value == theirs.get_scale()
    assert ours.skipped > 5


class Steep(nn.Module):
    """Layers whose gradients exceed float16's range at the first loss scales; the last stage's alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return ((x - y) ** 2).mean() * STEEPNESS


STEEPNESS = 30.0


def compiled(
    folder: Path, pins: dict[str, Any], precision: dict[str, str] | None, **job: Any
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 8), "y": torch.randn(8, 8)}
    passes = [{"mixed_precision": precision}] if precision else []
    ranks = pins.get("dp", 1) * pins.get("pp", 1)
    read = Job.model_validate({"pins": pins, "optimizer": {"lr": 0.01}, "passes": passes, **job})
    cluster = {"name": "local-cpu", "devices_per_host": ranks}
    autopar.compile(Steep(), cluster, batch=batch, job=read, passes=passes).save(folder)
    return batch


def train(folder: str, batch: dict[str, torch.Tensor], steps: int, resume: bool = False) -> tuple[Any, ...]:
    from autopar.runtime.engine import Engine

    engine = Engine(folder)
    if resume:
        engine.load(Path(folder) / "checkpoints")
    losses, scales = [], []
    for _ in range(steps):
        losses.append(engine.step(batch))
        scales.append(engine.scale.value if engine.scale else None)
    engine.save(Path(folder) / "checkpoints")
    return losses, scales, engine.steps, engine.optimizer.updates


@pytest.mark.parametrize("pins", [dict(dp=2, zero=2), dict(pp=2, microbatch=2)], ids=str)
def test_an_overflow_of_float16_skips_the_update_on_all_ranks_and_is_kept_by_the_checkpoint(tmp_path, pins):
    batch = compiled(tmp_path / "half", pins, {"compute": "float16"})
    first = spawn(train, 2, str(tmp_path / "half"), batch, 12)
    assert first[0] == first[1]
    losses, scales, steps, updates = first[0]
    skipped = steps - updates
    assert skipped > 0
    assert scales == [2.0 ** (16 - min(step, skipped)) for step in range(1, 13)]
    assert losses[:skipped] == losses[:1] * skipped, "a skipped update changes nothing"
    assert losses[-1] < losses[0]
    compiled(tmp_path / "full", pins, None)
    full = spawn(train, 2, str(tmp_path / "full"), batch, 12 - skipped)[0][0]
    assert losses[skipped:] == pytest.approx(full, rel=2e-2)
    again = spawn(train, 2, str(tmp_path / "half"), batch, 1, True)[0]
    assert again[1:] == ([scales[-1]], steps + 1, updates + 1)


# ------------------------------------------------------------------ stochastic rounding


def held(
    value: torch.Tensor, name: str = "w", rows: tuple[int, int] | None = None, whole: tuple[int, ...] = ()
) -> Held:
    entry = ParameterEntry(path=name, name=name, shape=whole or tuple(value.shape), dtype="bfloat16")
    return Held(name, entry, nn.Parameter(value), Shard(entry.shape, entry.place, 0, 1, rows), True)


def test_rounding_hits_the_two_neighbours_in_proportion_and_never_moves_what_fits():
    exact = torch.full((40000,), 1 + 2**-10)  # an eighth of the way from 1 to 1 + 2**-7
    parameter = held(torch.zeros(40000, dtype=torch.bfloat16))
    round_into(parameter, exact, seed=1, update=3)
    values, counts = parameter.local.float().unique(return_counts=True)
    assert values.tolist() == [1.0, 1 + 2**-7]
    assert abs(int(counts[1]) / 40000 - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 40000) ** 0.5
    fits = torch.tensor([1.0, -3.5, 0.0, float("inf"), float("-inf")])
    some = held(torch.zeros(5, dtype=torch.bfloat16))
    round_into(some, fits, seed=1, update=3)
    assert torch.equal(some.local.float(), fits)
    nan = held(torch.zeros(1, dtype=torch.bfloat16))
    round_into(nan, torch.tensor([float("nan")]), seed=1, update=3)
    assert nan.local.isnan().all()


def test_rounding_is_the_same_however_the_tensor_is_split_and_new_in_every_update():
    exact = torch.randn(7, 5)
    whole = held(torch.zeros(7, 5, dtype=torch.bfloat16))
    round_into(whole, exact, seed=1, update=3)
    for low, high in ((0, 3), (3, 7)):
        part = held(torch.zeros(high - low, 5, dtype=torch.bfloat16), rows=(low, high - low), whole=(7, 5))
        round_into(part, exact[low:high], seed=1, update=3)
        assert torch.equal(part.local, whole.local[low:high])
    other = bits(5, (7, 5), (0, 0), (7, 5), exact.device)
    assert not torch.equal(other, bits(6, (7, 5), (0, 0), (7, 5), exact.device))


def test_updates_too_small_for_bfloat16_are_lost_when_rounded_to_the_nearest_and_kept_on_average_stochastically():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        parameter = held(torch.ones(2000, dtype=torch.bfloat16))
        optimizer = Optimizer([parameter], Options(name="adamw", lr=1e-4, rounding=rounding))
        for _ in range(50):
            parameter.parameter.grad = torch.ones_like(parameter.parameter)
            optimizer.step()
        moved[rounding] = float((1 - parameter.local.float()).mean())
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(50 * 1e-4, rel=0.1)


def test_stochastic_rounding_is_refused_where_it_would_do_nothing():
    with pytest.raises(PlanError, match="parameters kept in bfloat16; these are float32"):
        Optimizer([held(torch.ones(3))], Options(rounding="stochastic"))
    with pytest.raises((SpecError, ValueError), match="computes updates in float32"):
        Options(rounding="stochastic", state="bfloat16")


# ------------------------------------------------------------------ what is gathered, and what sums are made in


def gathered(folder: str, batch: dict[str, torch.Tensor], steps: int) -> tuple[Any, ...]:
    """Losses, the parameters afterwards, and the dtypes that a gathered unit has."""
    from torch.distributed.fsdp import FSDPModule

    from autopar.runtime.engine import Engine

    engine = Engine(folder)
    losses = [engine.step(batch) for _ in range(steps)]
    dtypes = set()
    for part in engine.stages[0][2].modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            dtypes |= {p.dtype for p in part.parameters(recurse=False)}
            part.reshard()
    return losses, engine.state_dict(), dtypes


@pytest.mark.parametrize(
    ("pins", "reduce"), [(dict(dp=2, zero=3), "float32"), (dict(dp=2, zero=1), "bfloat16"), (dict(dp=2, zero=0), "bfloat16")]
)  # fmt: skip
def test_units_are_gathered_in_the_dtype_they_are_read_in_and_gradients_summed_in_their_own(tmp_path, pins, reduce):
    precision = {"compute": "bfloat16", "reduce": reduce}
    batch = compiled(tmp_path / "one", dict(dp=1), precision)
    wanted, values, _ = gathered(str(tmp_path / "one"), batch, 4)
    compiled(tmp_path / "two", pins, precision)
    losses, found, dtypes = spawn(gathered, 2, str(tmp_path / "two"), batch, 4)[0]
    assert dtypes == (set() if pins["zero"] == 0 else {torch.bfloat16})
    assert losses == pytest.approx(wanted, rel=1e-2)
    worst = max(float((found[n] - v).abs().max()) for n, v in values.items())
    assert all(t.dtype == torch.float32 for t in found.values()), "what is kept stays float32"
    assert worst < 0.01, "less than a step of AdamW"
    full = spawn(gathered, 2, str(tmp_path / "two"), batch, 4)[0]
    assert full[0] == losses


def test_stochastic_rounding_of_float32_parameters_is_refused_when_planning(tmp_path):
    with pytest.raises(PlanError, match="optimizer.rounding: .* these are float32"):
        compiled(tmp_path / "b", dict(dp=2), {}, optimizer={"rounding": "stochastic"})
