"""The networks of the table of first derivatives: layers, norms, recurrence, attention, hooks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from funcjac import BatchMixingError
from tests.cases import functions as fn
from tests.cases.case import Case, Setup, f32, f64, given, module, on_x, rand, x43
from tests.cases.modules import (
    Checkpointed,
    Counter,
    First,
    MovingAverage,
    Partly,
    SelfAttention,
    Stores,
    Tied,
    conv_net,
    mlp,
    random_mlp,
    with_tensor_hook,
)

DIFFERENT, SAME = {"randomness": "different"}, {"randomness": "same"}


def with_backward_hook() -> Setup:
    net = mlp()
    net[1].register_full_backward_hook(lambda _, grads, __: (3 * grads[0],))
    return given(net, x43())


def with_storing_hook() -> Setup:
    net, kept = mlp(), []
    net[1].register_forward_hook(lambda _, args, out: kept.append(out))
    return Setup(net, (x43(),), kept=kept)


def with_replacing_hook() -> Setup:
    net = mlp()
    net[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    net[1].register_forward_hook(lambda _, args, out: out * args[0])
    return given(net, x43())


def saved_on_cpu() -> Setup:
    net = mlp()

    def func(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return net(x)

    return given(func, x43())


MODULES = [
    Case("mlp", module(mlp)),
    Case("mlp_float32", module(mlp, dtype=f32)),
    Case("conv_net", module(conv_net, 4, 2, 4, 4)),
    Case("conv_transpose", module(lambda: nn.ConvTranspose1d(2, 3, 2), 4, 2, 3)),
    Case("flatten", module(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), 4, 2, 3)),
    Case("prelu", module(lambda: nn.Sequential(nn.Linear(3, 5), nn.PReLU(5))), cannot="vmap/rev"),
    Case(
        "prelu_batch_is_features",
        module(lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))),
        cannot="vmap/rev",
    ),
    Case("rrelu_eval", module(lambda: nn.Sequential(nn.Linear(3, 5), nn.RReLU())), cannot="vmap"),
    Case(
        "bilinear",
        lambda: given(nn.Bilinear(3, 2, 5, dtype=f64), x43(), rand(4, 2)),
        keywords={"argnums": (0, 1)},
        cannot="vmap",
    ),
    Case("weight_norm", module(lambda: parametrizations.weight_norm(nn.Linear(3, 5)))),
    Case("spectral_norm_eval", module(lambda: parametrizations.spectral_norm(nn.Linear(3, 5)))),
    Case(
        "spectral_norm_train",
        module(lambda: parametrizations.spectral_norm(nn.Linear(3, 5)), train=True),
        oracle="batch",
        smooth=False,
        cannot="loop vmap",
        moves=True,
    ),
    Case("frozen_module", module(lambda: mlp().requires_grad_(False))),
    Case("tied_weights", module(lambda: Tied(dtype=f64))),
    Case("bound_method", lambda: given(mlp().forward, x43())),
]

NORMALISATION = [
    Case(
        "batch_norm_eval",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())),
    ),
    Case(
        "batch_norm_train",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), train=True),
        expected=BatchMixingError,
        match="BatchNorm1d in training mode",
        moves=True,
    ),
    Case(
        "batch_norm_no_statistics",
        module(lambda: nn.BatchNorm1d(3, track_running_stats=False)),
        expected=BatchMixingError,
        match="BatchNorm1d without running statistics",
    ),
    Case(
        "instance_norm_train",
        module(
            lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), 4, 2, 3, train=True
        ),
        oracle="rows",
        cannot="vmap loop",
        moves=True,
    ),
    Case(
        "layer_norm", module(lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))), cannot="fwd"
    ),
    Case(
        "layer_norm_float32",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), dtype=f32),
        cannot="fwd",
    ),
    Case(
        "layer_norm_wide",
        module(lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8))),
        cannot="fwd",
    ),
    Case("group_norm", module(lambda: nn.GroupNorm(2, 4), 4, 4, 3)),
    Case("rms_norm", module(lambda: nn.RMSNorm(3))),
    Case("normalize", on_x(lambda x: F.normalize(x, dim=-1))),
]

RECURRENT = [
    Case("lstm", module(lambda: First(nn.LSTM(3, 5, batch_first=True)), 4, 2, 3), cannot="vmap"),
    Case(
        "lstm_float32",
        module(lambda: First(nn.LSTM(3, 5, batch_first=True)), 4, 2, 3, dtype=f32),
        twice=False,
        cannot="vmap",
    ),
    Case(
        "lstm_time_first",
        module(lambda: First(nn.LSTM(3, 5)), 2, 4, 3),
        keywords={"in_dims": 1, "out_dims": 1},
        cannot="vmap",
    ),
    Case(
        "lstm_bidirectional",
        module(lambda: First(nn.LSTM(3, 2, bidirectional=True, batch_first=True)), 4, 2, 3),
        cannot="vmap",
    ),
    Case(
        "lstm_batch_taken_for_time",
        module(lambda: First(nn.LSTM(3, 5)), 4, 2, 3),
        expected=BatchMixingError,
        match="LSTM with batch_first=False",
    ),
    Case("gru", module(lambda: First(nn.GRU(3, 5, batch_first=True)), 4, 2, 3), cannot="vmap"),
    Case(
        "gru_float32",
        module(lambda: First(nn.GRU(3, 5, batch_first=True)), 4, 2, 3, dtype=f32),
        cannot="vmap",
    ),
    Case("rnn", module(lambda: First(nn.RNN(3, 5, batch_first=True)), 4, 2, 3), cannot="vmap"),
    Case("lstm_cell", module(lambda: First(nn.LSTMCell(3, 5))), cannot="vmap"),
    Case("gru_cell", module(lambda: nn.GRUCell(3, 5)), cannot="vmap"),
    Case(
        "lstm_train",
        module(lambda: First(nn.LSTM(3, 5, batch_first=True)), 4, 2, 3, train=True),
        cannot="vmap",
    ),
]

ATTENTION = [
    Case("attention_with_weights", module(lambda: SelfAttention(True, batch_first=True), 4, 2, 4)),
    Case(
        "attention_without_weights",
        module(lambda: SelfAttention(False, batch_first=True), 4, 2, 4),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "attention_time_first",
        module(lambda: SelfAttention(True), 2, 4, 4),
        keywords={"in_dims": 1, "out_dims": 1},
    ),
    Case("sdpa", on_x(fn.sdpa, 4, 1, 3, 2), twice=False, cannot="vmap fwd"),
    Case(
        "sdpa_float32_causal",
        on_x(
            lambda x: F.scaled_dot_product_attention(x, x.sin(), x, is_causal=True),
            4,
            1,
            3,
            2,
            dtype=f32,
        ),
        twice=False,
        cannot="vmap fwd",
    ),
    Case("sdpa_math", on_x(fn.in_math(fn.sdpa), 4, 1, 3, 2)),
    Case(
        "encoder_layer",
        module(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 4, 2, 4),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "encoder_layer_frozen",
        module(
            lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).requires_grad_(False),
            4,
            2,
            4,
            dtype=f32,
        ),
        twice=False,
        cannot="vmap fwd",
    ),
]

RANDOM = [
    Case("dropout", module(random_mlp, train=True), keywords=DIFFERENT, oracle="batch"),
    Case("dropout_same", module(random_mlp, train=True), keywords=SAME, cannot="sum"),
    Case("dropout_eval", module(random_mlp)),
    Case("noise", on_x(fn.noisy), keywords=DIFFERENT),
    Case("noise_same", on_x(fn.noisy), keywords=SAME, cannot="sum"),
    Case("reparametrized", on_x(fn.reparametrized), keywords=DIFFERENT, cannot="vmap"),
    Case(
        "shuffled_rows",
        on_x(lambda x: x[torch.randperm(len(x)).roll(1)]),
        keywords=DIFFERENT,
        expected=BatchMixingError,
        match="rows depend on one another",
    ),
]

TORCH_SCRIPT = [
    Case("scripted_mlp", lambda: given(torch.jit.script(mlp()), x43()), cannot="vmap"),
    Case("traced_mlp", lambda: given(torch.jit.trace(mlp(), x43()), x43()), cannot="vmap"),
    Case(
        "scripted_function", lambda: given(torch.jit.script(fn.script_branch), x43()), cannot="vmap"
    ),
    Case(
        "traced_function",
        lambda: given(torch.jit.trace(fn.script_branch, x43()), x43()),
        cannot="vmap",
    ),
    Case(
        "scripted_inside", module(lambda: Partly(mlp(), nn.Linear(5, 2, dtype=f64))), cannot="vmap"
    ),
]

# Hooks, checkpoints, state
HOOKS = [
    Case("checkpoint", lambda: given(Checkpointed(mlp()), x43()), cannot="vmap"),
    Case("save_on_cpu", saved_on_cpu, cannot="vmap/rev"),
    Case("full_backward_hook", with_backward_hook, smooth=False, cannot="vmap"),
    Case("storing_hook", with_storing_hook),
    Case("storing_module", module(Stores), moves=True),
    Case("tensor_hook", on_x(with_tensor_hook), smooth=False, cannot="vmap"),
    Case("replacing_hooks", with_replacing_hook),
    Case(
        "moving_average",
        module(MovingAverage),
        oracle="batch",
        smooth=False,
        moves=True,
        cannot="vmap loop",
    ),
    Case(
        "counting_module",
        module(Counter),
        oracle="batch",
        smooth=False,
        moves=True,
        cannot="vmap loop",
    ),
]
