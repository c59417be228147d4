"""Every transform, of a network ``(B, 3) -> (B, 3)``."""

from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
)

OF_NETWORKS = {
    "jacobian": lambda net: batch_jacobian(net, chunk_size=2),
    "hessian": batch_hessian,
    "diagonal": batch_hessian_diagonal,
    "laplacian": batch_laplacian,
    "divergence": batch_divergence,
    "partials": lambda net: batch_partials(net, [(0,), (1, 1)]),
    "nested": lambda net: batch_jacobian(batch_jacobian(net)),
}
