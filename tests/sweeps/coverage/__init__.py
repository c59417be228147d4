"""A sweep over PyTorch's own databases of operators and modules.

Each sample becomes a batched function, goes through every transform, and is judged by a loop over
rows in plain autograd. ``python -m tests.sweeps.coverage`` runs it whole and writes
``docs/coverage.md``.
"""
