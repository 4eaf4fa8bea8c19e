"""Triton kernels as torch operators, each with a CPU reference. Importing this package registers the operators."""

from autopar.kernels.adamw import adamw_
from autopar.kernels.attention import flash_attention, flash_attention_backward, merge
from autopar.kernels.backend import interpreted
from autopar.kernels.experts import routed_experts
from autopar.kernels.flex import flex_attention
from autopar.kernels.fp8 import fp8_linear
from autopar.kernels.fp8_delayed import fp8_linear_delayed
from autopar.kernels.glu import glu
from autopar.kernels.loss import linear_cross_entropy, linear_logsumexp
from autopar.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from autopar.kernels.paged import paged_attention
from autopar.kernels.rotary import rotary

__all__ = [
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "flash_attention",
    "flash_attention_backward",
    "flex_attention",
    "fp8_linear",
    "fp8_linear_delayed",
    "glu",
    "interpreted",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logsumexp",
    "merge",
    "paged_attention",
    "rms_norm",
    "rotary",
    "routed_experts",
]
