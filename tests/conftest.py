"""What holds for every test: a seed, one thread, and torch left as it was found."""

import importlib
import pathlib
import warnings

import pytest
import torch

from tests.tensors import set_seed

HERE = pathlib.Path(__file__).parent
# They take longest. ``make test`` hands out whole files, in this order: two workers end together.
LONGEST = [
    "test_examples.py",
    "dispatch/test_compiled.py",
    "operators/test_second_order_cases.py",
    "sweeps/test_coverage.py",
    "torch_faults/test_torch_faults.py",
    "operators/test_jacobian_cases.py",
    "dispatch/test_stale.py",
    "operators/test_nesting.py",
    "test_demo.py",
    "dispatch/test_contexts.py",
    "operators/test_second_order_nesting.py",
    "taylor/test_taylor.py",
    "sweeps/test_compiled_functions.py",
    "engines/test_memory.py",
    "sweeps/test_programs.py",
    "dispatch/test_rule.py",
]


def pytest_collection_modifyitems(items):
    rank = {HERE / file: index for index, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    # torch imports this on the first jvp of a function that needs it, and scripts it with a
    # deprecation warning of its own; warnings are errors here, and the import would fail.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
        importlib.import_module("torch._dynamo")


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    set_seed(0)
    before = _settings()
    yield
    assert _settings() == before


def _settings():
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly mode": torch.is_anomaly_enabled(),
        "transforms": torch._C._functorch.peek_interpreter_stack(),
        "forward-mode level": torch.autograd.forward_ad._current_level,
        "vmap fallback": torch._C._functorch._is_vmap_fallback_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
