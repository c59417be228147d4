"""The operations that PyTorch differentiates wrongly: one row each.

Every set that the library uses is derived from ``FAULTS``. ``tests/test_torch_faults.py`` derives
the rows from torch's own database of operators: a release that mends or adds a fault fails there,
with the name of the operation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

import funcjac._torch_faults.attention as attention
import funcjac._torch_faults.linalg as linalg
import funcjac._torch_faults.norms as norms
import funcjac._torch_faults.others as others
from funcjac._environment import torch_private
from funcjac._torch_faults.fault import Fault, fault

_UMBRELLA = 198017  # torch's own list of wrong formulas
_NORM = "forward_again batching_again reverse_3"
_BATCH_NORM = {
    F.batch_norm: norms.batch_norm,
    torch.batch_norm: norms.torch_batch_norm,
    F.instance_norm: norms.instance_norm,
    torch.instance_norm: norms.torch_instance_norm,
}
_NORMS = (
    fault(
        "native_layer_norm",
        _NORM,
        "NativeLayerNormBackward0",
        {
            F.layer_norm: norms.layer_norm,
            torch.layer_norm: norms.layer_norm,
            torch.native_layer_norm: norms.native_layer_norm,
        },
        issue=175754,
    ),
    fault(
        "native_group_norm",
        "reverse_1",
        "NativeGroupNormBackward0.1 NativeGroupNormBackward0.2",
        {torch.native_group_norm: norms.native_group_norm},
        note="the gradient of the mean or the deviation alone is zero",
    ),
    fault(
        "native_batch_norm",
        _NORM,
        "NativeBatchNormBackward0",
        {**_BATCH_NORM, torch.native_batch_norm: norms.tracked_batch_norm},
        issue=186256,
    ),
    fault(
        "_native_batch_norm_legit",
        _NORM,
        "NativeBatchNormLegitBackward0 NativeBatchNormLegitBackward1",
        {torch_private.legit_batch_norm: norms.legit_batch_norm},
        issue=186256,
    ),
    fault(
        "_batch_norm_with_update",
        "forward_again reverse_3",
        "BatchNormWithUpdateBackward0",
        {torch_private.updating_batch_norm: norms.updating_batch_norm},
        issue=186256,
    ),
    fault("cudnn_batch_norm", _NORM, "CudnnBatchNormBackward0", _BATCH_NORM, issue=186256),
    fault("miopen_batch_norm", _NORM, "MiopenBatchNormBackward0", _BATCH_NORM, issue=186256),
    fault(
        "_weight_norm_interface",
        "reverse_2",
        "WeightNormInterfaceBackward0",
        {torch_private.fused_weight_norm: norms.weight_norm},
    ),
)
_POWERS = {
    torch.pow: linalg.power,
    Tensor.pow: linalg.power,
    Tensor.__pow__: linalg.power,
    Tensor.__rpow__: linalg.reversed_power,
    Tensor.pow_: linalg.pow_in_place,
    Tensor.__ipow__: linalg.pow_in_place,
    torch.float_power: linalg.float_power,
    Tensor.float_power: linalg.float_power,
}
_LINALG = (
    fault(
        "pow.Tensor_Tensor",
        "reverse_2",
        "PowBackward1",
        _POWERS,
        note="what moves with an exponent of zero is lost",
        compiles=False,
    ),
    fault(
        "pow of a real and a complex argument",
        "forward forward_again",
        replacements=_POWERS,
        note="the dtypes show it, no name does",
        compiles=False,
    ),
    fault(
        "_linalg_det",
        "forward forward_vmap forward_again reverse_1",
        "LinalgDetBackward0",
        {torch.det: linalg.det, Tensor.det: linalg.det, torch.linalg.det: linalg.det},
        {
            torch.det: linalg.det_in_transforms,
            Tensor.det: linalg.det_in_transforms,
            torch.linalg.det: linalg.det_in_transforms,
        },
        note="the gradient of singular matrices; in torch.func, differentiated again, of all",
        issue=192521,
        compiles=False,
    ),
    fault(
        "_linalg_slogdet",
        "forward_vmap forward_again",
        in_transforms={
            torch.slogdet: linalg.slogdet,
            Tensor.slogdet: linalg.slogdet,
            torch.linalg.slogdet: linalg.slogdet,
            torch.logdet: linalg.logdet,
            Tensor.logdet: linalg.logdet,
        },
        issue=192540,
        compiles=False,
    ),
    fault(
        "_linalg_solve_ex",
        "forward_vmap forward_again",
        in_transforms={torch.linalg.solve: linalg.solve},
        note="tensorsolve and solve_ex run it as well, and are not intercepted",
        issue=192540,
        compiles=False,
    ),
    fault(
        "linalg_lu_solve",
        "forward_vmap forward_again vmap",
        in_transforms={
            torch.linalg.lu_solve: linalg.lu_solve,
            torch.lu_solve: linalg.torch_lu_solve,
            Tensor.lu_solve: linalg.torch_lu_solve,
        },
    ),
    fault(
        "cholesky_inverse",
        "forward forward_again reverse_1",
        "CholeskyInverseBackward0",
        {
            torch.cholesky_inverse: linalg.cholesky_inverse,
            Tensor.cholesky_inverse: linalg.cholesky_inverse,
        },
        note="the gradient by the triangle that is not read",
        issue=_UMBRELLA,
    ),
    fault(
        "_cdist_forward",
        "batching vmap reverse_2",
        "CdistBackward0",
        {torch.cdist: linalg.cdist},
        issue=83510,
    ),
    fault(
        "_pdist_forward",
        "reverse_2",
        "PdistBackward0",
        {torch.pdist: linalg.pdist, F.pdist: linalg.pdist},
    ),
    fault("linalg_householder_product", "forward_again", issue=196698),
    fault("linalg_eig", "forward_again"),
    fault("_linalg_eigh", "forward_again"),
    fault("triangular_solve", "forward forward_again"),
)
_ATTENTION = tuple(
    fault(
        op,
        "reverse_2",
        node,
        {
            F.scaled_dot_product_attention: attention.scaled_dot_product_attention,
            F.multi_head_attention_forward: attention.multi_head_attention_forward,
        },
        note="no forward formula either; with dropout, forward mode under vmap ends the process",
        issue=116350,
    )
    for op, node in {
        "_scaled_dot_product_flash_attention_for_cpu": (
            "ScaledDotProductFlashAttentionForCpuBackward0"
        ),
        "_scaled_dot_product_flash_attention": "ScaledDotProductFlashAttentionBackward0",
        "_scaled_dot_product_efficient_attention": "ScaledDotProductEfficientAttentionBackward0",
        "_scaled_dot_product_cudnn_attention": "ScaledDotProductCudnnAttentionBackward0",
    }.items()
)
_SCATTERS = (
    fault(
        "select_scatter",
        "forward_again vmap",
        # What the batching rule leaves in the graph: of plain code the gradient is right.
        "ScatterBackward0",
        {
            torch.select_scatter: others.select_scatter,
            Tensor.select_scatter: others.select_scatter,
        },
        note="the gradient by the source is counted once for each of its entries",
    ),
    fault(
        "as_strided_scatter",
        "reverse_1",
        "AsStridedScatterBackward0",
        {
            torch.as_strided_scatter: others.as_strided_scatter,
            Tensor.as_strided_scatter: others.as_strided_scatter,
        },
        note="what was overwritten is taken for what was kept",
    ),
    fault("scatter_reduce", "forward forward_again", note="products where a factor is zero"),
    fault(
        "max_unpool2d",
        "reverse_1",
        "MaxUnpool2DBackward0",
        {
            F.max_unpool1d: others.max_unpool(1, F.max_unpool1d),
            F.max_unpool2d: others.max_unpool(2, F.max_unpool2d),
        },
        note="where windows overlap",
    ),
    fault(
        "max_unpool3d",
        "reverse_1",
        "MaxUnpool3DBackward0",
        {F.max_unpool3d: others.max_unpool(3, F.max_unpool3d)},
        note="where windows overlap",
    ),
)
_CHUNKED = "_linear_cross_entropy_batch_chunked"
_OTHERS = (
    *(
        fault(
            op,
            f"forward forward_again single_pass reverse_2{kinds}",
            f"GeneratedBackwardFor_torch_nn_{op}_defaultBackward",
            {getattr(F, "linear_cross_entropy", None): others.linear_cross_entropy},
            since="2.13",
            note="second derivatives are zero",
        )
        for op, kinds in {_CHUNKED: " vmap", f"{_CHUNKED}_no_reduction": ""}.items()
    ),
    fault(
        "normal",
        "forward reverse_1",
        "NormalBackward1 NormalBackward2 NormalBackward3",
        {torch.normal: others.normal},
        note="the gradient by mean and deviation is zero",
        issue=4620,
    ),
    fault(
        "_ctc_loss",
        "reverse_1",
        "CtcLossBackward0 CtcLossBackward1",
        {F.ctc_loss: others.ctc_loss},
        note="the input is taken for the output of log_softmax",
        issue=52241,
    ),
    fault(
        "logcumsumexp",
        "forward forward_again reverse_2 reverse_3",
        "LogcumsumexpBackward0",
        {torch.logcumsumexp: others.logcumsumexp, Tensor.logcumsumexp: others.logcumsumexp},
        note="NaN where the cotangent is zero; forward mode where numbers are large",
        issue=196705,
    ),
    fault(
        "logaddexp",
        "reverse_2",
        "LogaddexpBackward0",
        {torch.logaddexp: others.logaddexp, Tensor.logaddexp: others.logaddexp},
        note="NaN where the arguments are far apart",
        issue=196704,
    ),
    fault(
        "hardsigmoid",
        "reverse_2",
        "HardsigmoidBackward0",
        {F.hardsigmoid: others.hardsigmoid},
        note="there is none",
    ),
    fault("cumprod", "forward_again", note="where a factor is zero", issue=196701),
)
# Nothing is intercepted: argnums are made non-negative before torch.func sees them.
_TRANSFORMS = (
    fault("torch.func.jacfwd", "argnums", since="2.13"),
    fault("torch.func.hessian", "argnums", since="2.13"),
)

FAULTS: tuple[Fault, ...] = (
    *_NORMS,
    *_LINALG,
    *_ATTENTION,
    *_SCATTERS,
    *_OTHERS,
    *_TRANSFORMS,
)


def nodes_with(kinds: frozenset[str], *, replaced: bool = True) -> frozenset[str]:
    """Names of the autograd nodes of what has one of ``kinds`` wrong and a replacement, or none."""
    rows = (row for row in FAULTS if row.wrong & kinds and bool(row.calls) == replaced)
    return frozenset(node for row in rows for node in row.nodes)


def ops_with(kinds: frozenset[str]) -> frozenset[str]:
    """Names of the ATen operations that have one of ``kinds`` wrong."""
    return frozenset(row.op for row in FAULTS if row.wrong & kinds)
