"""p_tuning_v2: deep prompts, trained in every layer (Liu et al. 2022, arXiv:2110.07602)."""

from __future__ import annotations

from typing import ClassVar

from passes.peft.prefix_tuning import PrefixTuning


class PTuningV2(PrefixTuning):
    """Trained prompts in every layer, not only before the first: as in the authors' code, keys and values that stand before
    those of the tokens. That is `prefix_tuning`; what differs is what is customary (no reparameterization, section 3.3).
    """

    name: ClassVar[str] = "p_tuning_v2"
