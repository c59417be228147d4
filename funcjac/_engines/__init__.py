"""Engines, and the choice between them."""

from funcjac._engines._choose import solve
from funcjac._engines._record import Memory, Record
from funcjac._engines._rows import BY_ENGINE
from funcjac._engines._transformed import solve_transformed
from funcjac._passes import Context, Jacobian

__all__ = ["BY_ENGINE", "Context", "Jacobian", "Memory", "Record", "solve", "solve_transformed"]
