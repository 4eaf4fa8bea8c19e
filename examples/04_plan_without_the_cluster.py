"""A plan for hardware you do not own yet: Llama-3-70B on 64 H100, against the same cluster with half the memory."""

from __future__ import annotations

from autopar.api import plan_job
from autopar.plan.text import summary
from autopar.spec.load import load_job


def main() -> None:
    cache: dict = {}  # the model is traced once
    whole = plan_job(load_job("llama-3-70b-h100", []), cache)
    less = plan_job(load_job("llama-3-70b-h100", ["cluster.device.memory=48 GiB"]), cache)
    print(summary(whole, "llama-3-70b on 64 H100"))
    print(
        f"\nwith 48 GiB instead of 80: {less.cost.step_seconds / whole.cost.step_seconds:.3f} × the time, {less.plan.mesh}"
    )
    assert less.cost.step_seconds >= whole.cost.step_seconds * 0.99


if __name__ == "__main__":
    main()
