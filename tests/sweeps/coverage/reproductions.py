"""The smallest functions that plain autograd differentiates wrongly, without a word.

Each is code that defines ``f`` and ``x``; ``order`` says which derivative of ``f`` at ``x`` central
differences contradict. A test runs them, and fails with the name of one that PyTorch has mended.
"""

from typing import NamedTuple


class Reproduction(NamedTuple):
    name: str
    units: str  # a pattern of the units concerned
    order: int
    what: str
    code: str


REPRODUCTIONS = [
    Reproduction(
        "chunked linear_cross_entropy",
        r"linear_cross_entropy|LinearCrossEntropyLoss",
        2,
        "the gradient is computed in the forward pass, and has a second derivative of zero",
        """
from torch.nn import LinearCrossEntropyOptions
x, w = torch.rand(3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
options = LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
f = lambda x: torch.nn.functional.linear_cross_entropy(x, w, torch.tensor(2), options=options)
""",
    ),
    Reproduction(
        "native_group_norm",
        r"native_group_norm",
        1,
        "gradients of its second and third output, mean and reciprocal deviation, are zero",
        """
x = torch.rand(1, 2, 4, dtype=torch.float64)
f = lambda x: torch.native_group_norm(x, None, None, 1, 2, 4, 1, 1e-5)[2]
""",
    ),
    Reproduction(
        "as_strided_scatter",
        r"as_strided_scatter",
        1,
        "what is overwritten has a gradient, and what is kept has none",
        """
x, y = torch.rand(3, 3, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
f = lambda x: torch.as_strided_scatter(x, y, (2, 2), (1, 2), 1)
""",
    ),
    Reproduction(
        "normal",
        r"op normal",
        1,
        "for a given draw the result moves with mean and deviation, and has gradients of zero",
        """
x = torch.rand(3, dtype=torch.float64)
def f(x):
    torch.manual_seed(0)
    return torch.normal(x, x)
""",
    ),
    Reproduction(
        "max_unpool",
        r"max_unpool|MaxUnpool",
        1,
        "where indices repeat, as with overlapping windows, what is overwritten has a gradient",
        """
x, indices = torch.rand(1, 1, 2, dtype=torch.float64), torch.tensor([[[1, 1]]])
f = lambda x: torch.nn.functional.max_unpool1d(x, indices, 2)
""",
    ),
    Reproduction(
        "ctc_loss",
        r"CTCLoss|ctc_loss",
        1,
        "the gradient takes the input for the output of log_softmax",
        """
x = torch.rand(3, 4, dtype=torch.float64)
words = torch.tensor([1]), torch.tensor(3), torch.tensor(1)
f = lambda x: torch.nn.functional.ctc_loss(x, *words)
""",
    ),
]
