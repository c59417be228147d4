"""Hessians by Taylor propagation: every pair of coordinates, each once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcjac._batched import Call, Output
from funcjac._directions import basis, row_shape
from funcjac._jets import Jet, Scheme
from funcjac._linear import Context
from funcjac._modes import Route
from funcjac._taylor import propagate, record

Blocks = list[list[Tensor]]


def all_pairs(call: Call, route: Route, context: Context) -> tuple[Any, Blocks, Output]:
    """``H[i][j][k]`` and ``J[i][j]``, each ``(B, *out, ...)``."""
    del route  # all at once: it is meant for few inputs
    recording = record(call, context)
    inputs, dims = call.inputs, call.layout.diff_dims
    rows = [row_shape(x, dim) for x, dim in zip(inputs, dims)]
    sizes = [row.numel() for row in rows]
    total, device = sum(sizes), inputs[0].device
    left, right = torch.triu_indices(total, total, device=device)
    place = torch.empty(total, total, dtype=torch.long, device=device)
    place[left, right] = place[right, left] = torch.arange(len(left), device=device)
    scheme = Scheme(total, len(left), left, right)
    jets = propagate(recording, _seeds(inputs, dims, sizes), scheme)
    hess, jac = [], []
    for out, jet in zip(recording.output.leaves, jets):
        whole = _whole(jet, out, total + len(left))
        slopes = whole[:total].movedim(0, -1).split(sizes, -1)  # (B, *out, N)
        bends = whole[total:][place].movedim((0, 1), (-2, -1))  # (B, *out, N, N)
        dtypes = [torch.result_type(out, x) for x in inputs]
        jac.append([_block(s, out, row, dtype) for s, row, dtype in zip(slopes, rows, dtypes)])
        bands = zip(bends.split(sizes, -2), rows, dtypes)
        hess.append(
            [
                [_block(b, out, one + two, dtype) for b, two in zip(band.split(sizes, -1), rows)]
                for band, one, dtype in bands
            ]
        )
    return hess, jac, recording.output


def _seeds(inputs: list[Tensor], dims: Any, sizes: list[int]) -> dict[int, Tensor]:
    """The basis of all inputs together."""
    if len(inputs) == 1:
        return {0: basis(inputs[0], dims[0])}
    seeds, start, total = {}, 0, sum(sizes)
    for j, (x, dim, size) in enumerate(zip(inputs, dims, sizes)):
        before, after = x.new_zeros(start, *x.shape), x.new_zeros(total - start - size, *x.shape)
        seeds[j] = torch.cat([before, basis(x, dim), after])
        start += size
    return seeds


def _whole(jet: Jet, out: Tensor, length: int) -> Tensor:
    """A jet with zeros for all that is missing."""
    found = out.new_zeros(0, *out.shape) if jet is None else jet
    return torch.cat([found, out.new_zeros(length - len(found), *out.shape)])


def _block(found: Tensor, out: Tensor, row: torch.Size, dtype: torch.dtype) -> Tensor:
    return found.reshape((*out.shape, *row)).to(dtype).contiguous()
