"""Taylor propagation: first and higher derivatives in one pass through the operations of a run.

``func`` runs once under a :class:`Recorder`. Then derivatives along directions are pushed through
the recorded operations, each by its rule. A second derivative costs one more number for each
element, instead of another differentiation of a whole differentiation. (A. Griewank, J. Utke,
A. Walther, "Evaluating higher derivative tensors by forward propagation of univariate Taylor
series", 2000; J. Bettencourt, M. Johnson, D. Duvenaud, "Taylor-mode automatic differentiation
for higher-order derivatives in JAX", 2019; R. Li et al., "A computational framework for neural
network-based variational Monte Carlo with forward Laplacian", 2024.)
"""
