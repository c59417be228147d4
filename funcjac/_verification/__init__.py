"""Verifies results against plain autograd through the same graph, and that rows are independent."""
