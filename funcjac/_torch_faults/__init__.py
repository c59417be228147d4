"""Operations that PyTorch differentiates wrongly, in one table, and their replacements."""

from funcjac._torch_faults.replace import (
    UseReplacements,
    forward_faults,
    graph_names,
    needs_replacement,
)
from funcjac._torch_faults.table import FAULTS

__all__ = ["FAULTS", "UseReplacements", "forward_faults", "graph_names", "needs_replacement"]
