"""Is a result right: plain autograd through the same graph, and rows that depend on one another."""
