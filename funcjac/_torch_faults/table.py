"""Table of the operations that PyTorch differentiates wrongly: one row each.

Every set that the library uses is derived from ``FAULTS``. ``tests/torch_faults`` derives the rows
from torch's own database of operators: a release that mends or adds a fault fails there, with the
name of the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

import funcjac._torch_faults.attention as attention
import funcjac._torch_faults.linalg as linalg
import funcjac._torch_faults.norms as norms
import funcjac._torch_faults.others as others

Calls = dict[Any, Callable[..., Any]]


@dataclass(frozen=True)
class Fault:
    """One operation that PyTorch differentiates wrongly.

    The derivatives that may be wrong:

    * ``reverse_1``, ``reverse_2``, ``reverse_3``: the plain first, second, third reverse
      derivative, or there is none;
    * ``batching``: the first one, where cotangents are batched; ``batching_again``: the second
      one, where cotangents of the first are batched;
    * ``vmap``: derivatives of reverse mode, where the operation itself runs under torch.vmap;
    * ``single_pass``: backward runs once and frees what it needs: a graph serves one pass;
    * ``forward``: the forward formula; ``forward_vmap``: the same under torch.vmap;
      ``forward_again``: those of second order: over reverse, over forward, under reverse;
    * ``argnums``: a transform of torch.func, for negative argnums.

    Attributes:
        op: name of the ATen operation, or name and overload.
        derivatives: names of the wrong ones, of those above.
        node_names: names of the autograd nodes for which ``func`` runs again, with replacements;
            with ``.k`` only where a gradient flows into output ``k``.
        replacements: function that runs instead of each Python call, with right derivatives.
        issue: number of an issue of pytorch/pytorch.
        note: the fault itself, where ``derivatives`` do not say it.
        since: first release of torch that has the fault, as far as known: none below 2.11 was
            looked at.
    """

    op: str
    derivatives: str
    node_names: str = ""
    replacements: Calls = field(default_factory=dict)
    issue: int = 0
    note: str = ""
    since: str = "2.11"

    @property
    def wrong(self) -> frozenset[str]:
        return frozenset(self.derivatives.split())

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(self.node_names.split())


def _calls(run: Callable[..., Any], *names: str) -> Calls:
    """One replacement of all calls of these names that this release has."""
    places = (torch, Tensor, torch.linalg, F)
    return {getattr(p, name): run for name in names for p in places if hasattr(p, name)}


_NORM = "forward_again batching_again reverse_3"
_BATCH_NORMS = norms.BATCH_NORMS | _calls(norms.legit_batch_norm, "_native_batch_norm_legit")
_POWERS = {
    **_calls(linalg.power, "pow", "__pow__"),
    **_calls(linalg.pow_in_place, "pow_", "__ipow__"),
    **_calls(lambda exponent, x: linalg.power(x, exponent), "__rpow__"),
    **_calls(linalg.float_power, "float_power"),
}
_ATTENTION = {
    **_calls(attention.scaled_dot_product_attention, "scaled_dot_product_attention"),
    **_calls(attention.multi_head_attention_forward, "multi_head_attention_forward"),
}
_UNPOOL = {
    unpool: others.max_unpool(dims, unpool)
    for dims, unpool in enumerate((F.max_unpool1d, F.max_unpool2d, F.max_unpool3d), 1)
}

# fmt: off
_NORMS = (
    Fault("native_layer_norm", _NORM, "NativeLayerNormBackward0", norms.LAYER_NORMS, issue=175754),
    Fault("native_group_norm", "reverse_1", "NativeGroupNormBackward0.1 NativeGroupNormBackward0.2",
          _calls(norms.native_group_norm, "native_group_norm"),
          note="the gradient of the mean or the deviation alone is zero"),
    *(Fault(op, wrong, nodes, _BATCH_NORMS, issue=186256) for op, wrong, nodes in (
        ("native_batch_norm", _NORM, "NativeBatchNormBackward0"),
        ("_native_batch_norm_legit", _NORM,
         "NativeBatchNormLegitBackward0 NativeBatchNormLegitBackward1"),
        ("_batch_norm_with_update", "forward_again reverse_3", "BatchNormWithUpdateBackward0"),
        ("cudnn_batch_norm", _NORM, "CudnnBatchNormBackward0"),
        ("miopen_batch_norm", _NORM, "MiopenBatchNormBackward0"))),
    Fault("_weight_norm_interface", "reverse_2", "WeightNormInterfaceBackward0",
          _calls(norms.weight_norm, "_weight_norm")),
)
_LINALG = (
    Fault("pow.Tensor_Tensor", "reverse_2", "PowBackward1", _POWERS,
          note="the derivative by an exponent of zero is lost"),
    Fault("pow of a real and a complex argument", "forward forward_again", "", _POWERS,
          note="only the dtypes show it"),
    Fault("_linalg_det", "forward forward_vmap forward_again reverse_1", "LinalgDetBackward0",
          _calls(linalg.det, "det"), issue=192521,
          note="the gradient of singular matrices; in torch.func, differentiated again, of all"),
    Fault("_linalg_slogdet", "forward_vmap forward_again", "",
          _calls(linalg.slogdet, "slogdet") | _calls(linalg.logdet, "logdet"),
          issue=192540),
    Fault("_linalg_solve_ex", "forward_vmap forward_again", "", {torch.linalg.solve: linalg.solve},
          issue=192540,
          note="tensorsolve and solve_ex run it as well, and are not intercepted"),
    Fault("linalg_lu_solve", "forward_vmap forward_again vmap", "",
          _calls(linalg.torch_lu_solve, "lu_solve") | {torch.linalg.lu_solve: linalg.lu_solve}),
    Fault("cholesky_inverse", "forward forward_again reverse_1", "CholeskyInverseBackward0",
          _calls(linalg.cholesky_inverse, "cholesky_inverse"),
          issue=198017, note="the gradient by the triangle that is not read"),
    Fault("_cdist_forward", "batching vmap reverse_2", "CdistBackward0",
          _calls(linalg.cdist, "cdist"), issue=83510),
    Fault("_pdist_forward", "reverse_2", "PdistBackward0", _calls(linalg.pdist, "pdist")),
    Fault("linalg_householder_product", "forward_again", issue=196698),
    Fault("linalg_eig", "forward_again"),
    Fault("_linalg_eigh", "forward_again"),
    Fault("triangular_solve", "forward forward_again"),
)
_ATTENTIONS = tuple(
    Fault(f"_scaled_dot_product_{op}", "reverse_2", f"ScaledDotProduct{node}Backward0", _ATTENTION,
          issue=116350,
          note="no forward formula either; with dropout, forward mode under vmap ends the process")
    for op, node in {
        "flash_attention_for_cpu": "FlashAttentionForCpu", "flash_attention": "FlashAttention",
        "efficient_attention": "EfficientAttention", "cudnn_attention": "CudnnAttention"}.items()
)
_SCATTERS = (
    # Its batching rule leaves this node in the graph; the gradient of plain code is right.
    Fault("select_scatter", "forward_again vmap", "ScatterBackward0",
          _calls(others.select_scatter, "select_scatter"),
          note="the gradient by the source is counted once for each of its entries"),
    Fault("as_strided_scatter", "reverse_1", "AsStridedScatterBackward0",
          _calls(others.as_strided_scatter, "as_strided_scatter"),
          note="overwritten entries are taken for the others"),
    Fault("scatter_reduce", "forward forward_again", note="products where a factor is zero"),
    Fault("max_unpool2d", "reverse_1", "MaxUnpool2DBackward0", _UNPOOL, note="overlapping windows"),
    Fault("max_unpool3d", "reverse_1", "MaxUnpool3DBackward0", _UNPOOL, note="overlapping windows"),
)
_CHUNKED = "_linear_cross_entropy_batch_chunked"
_OTHERS = (
    *(Fault(op, f"forward forward_again single_pass reverse_2 {more}",
            f"GeneratedBackwardFor_torch_nn_{op}_defaultBackward",
            _calls(others.linear_cross_entropy, "linear_cross_entropy"),
            since="2.13", note="second derivatives are zero")
      for op, more in {_CHUNKED: "vmap", f"{_CHUNKED}_no_reduction": ""}.items()),
    Fault("normal", "forward reverse_1", "NormalBackward1 NormalBackward2 NormalBackward3",
          _calls(others.normal, "normal"), issue=4620,
          note="the gradient by mean and deviation is zero"),
    Fault("_ctc_loss", "reverse_1", "CtcLossBackward0 CtcLossBackward1",
          {F.ctc_loss: others.ctc_loss}, issue=52241,
          note="the input is taken for the output of log_softmax"),
    Fault("logcumsumexp", "forward forward_again reverse_2 reverse_3", "LogcumsumexpBackward0",
          _calls(others.logcumsumexp, "logcumsumexp"), issue=196705,
          note="NaN where the cotangent is zero; forward mode where numbers are large"),
    Fault("logaddexp", "reverse_2", "LogaddexpBackward0", _calls(others.logaddexp, "logaddexp"),
          issue=196704, note="NaN where the arguments are far apart"),
    Fault("hardsigmoid", "reverse_2", "HardsigmoidBackward0",
          _calls(others.hardsigmoid, "hardsigmoid"), note="there is none"),
    Fault("_prelu_kernel", "vmap", "", _calls(others.prelu, "prelu"),
          note="where cotangents are batched once more: rows of one length give wrong slopes"),
    Fault("cumprod", "forward_again", note="where a factor is zero", issue=196701),
)
# Nothing is intercepted: argnums are made non-negative before torch.func sees them.
_TRANSFORMS = (
    Fault("torch.func.jacfwd", "argnums", since="2.13"),
    Fault("torch.func.hessian", "argnums", since="2.13"),
)
# fmt: on

FAULTS = (*_NORMS, *_LINALG, *_ATTENTIONS, *_SCATTERS, *_OTHERS, *_TRANSFORMS)
