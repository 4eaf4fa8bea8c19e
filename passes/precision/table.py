"""Which operators compute in which dtype under mixed precision, with sources.

The lists follow torch.amp ("CUDA Ops that can autocast to float16 / to float32", torch 2.13 documentation), but for
operators that accumulate in float32 inside: torch's native softmax, layer_norm, rms_norm and group_norm read and write half
precision and compute in float32 (aten/src/ATen/native, `acc_type`), so they stay in the compute dtype, as Megatron-LM's
fused kernels do.
"""

from __future__ import annotations

from torch import fx

from autopar.ir.functions import FunctionCall


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMPUTE = words(
    "fp8_linear fp8_linear_delayed "
    "linear matmul mm bmm mv addmm addmv addbmm baddbmm einsum bilinear chain_matmul dot conv1d conv2d conv3d "
    "convolution conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention embedding embedding_bag "
    "layer_norm rms_norm group_norm add_layer_norm add_rms_norm rotary flash_attention flex_attention "
    "linear_cross_entropy prelu lstm gru"
)
"""Products, the tables that feed them, and norms that are one operator: all floating operands in the compute dtype."""

WIDE = words(
    # sums over many terms, and what norms written out consist of (amp; Zhang and Sennrich 2019 for RMSNorm)
    "sum mean var std var_mean std_mean prod norm linalg_vector_norm cumsum cumprod logsumexp logcumsumexp rsqrt reciprocal "
    # functions that turn small errors into large ones, or leave half precision's range (amp)
    "exp exp2 expm1 log log2 log10 log1p softplus cosh sinh tan acos asin erfinv dist cdist renorm "
    # angles: positions × frequencies exceed half precision's resolution (Su et al. 2021; transformers does the same)
    "cos sin polar "
    # losses (amp)
    "cross_entropy_loss nll_loss nll_loss_nd log_softmax binary_cross_entropy binary_cross_entropy_with_logits mse_loss "
    "l1_loss smooth_l1_loss huber_loss kl_div cosine_embedding_loss margin_ranking_loss triplet_margin_loss "
    "soft_margin_loss poisson_nll_loss ctc_loss"
)
"""All floating operands, and the result, in float32."""

STATISTICS = words("pow square mul")
"""Wide where nothing but a wide operator reads them: the squares of a variance. amp lists pow for their sake alone; the powers of
a written-out GELU stay in the compute dtype."""

PROMOTING = words("add sub rsub mul div true_divide maximum minimum where cat stack pow lerp")
"""Operators that take operands of different dtypes and compute in the wider one."""

SOFTMAX = frozenset(("softmax", "safe_softmax"))
OWN_STATISTICS = words("batch_norm instance_norm native_batch_norm cudnn_batch_norm")
"""Only the first operand is cast: running statistics and weights stay float32 (torch accepts half-precision inputs so)."""

CASTS = frozenset(("to", "to_copy"))


def name_of(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; the name of any other target."""
    target = node.target
    if isinstance(target, FunctionCall):
        return target.__name__
    schema = getattr(target, "_schema", None)  # a torch operator, or a plain function
    return schema.name.split("::")[-1].strip("_") if schema is not None else str(getattr(target, "__name__", target))


def statistic(node: fx.Node) -> bool:
    """Whether a node is the square of its operand and only wide operators read it."""
    if name_of(node) not in STATISTICS or not node.users or not all(name_of(u) in WIDE for u in node.users):
        return False
    args = node.args
    return args[0] is args[1] if name_of(node) == "mul" else name_of(node) == "square" or args[1] in (2, 2.0)
