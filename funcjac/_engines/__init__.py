"""How rows are differentiated: through one graph, under torch.func, or one after the other."""
