"""Engines, and the choice between them."""

from funcjac._engines._choose import solve
from funcjac._engines._record import Memory, Record
from funcjac._engines._rows import executed, run
from funcjac._engines._transformed import solve_transformed, solve_within
from funcjac._linear import Context
from funcjac._passes import Jacobian

__all__ = [
    "Context",
    "Jacobian",
    "Memory",
    "Record",
    "executed",
    "run",
    "solve",
    "solve_transformed",
    "solve_within",
]
