"""Turns the user's arguments into a call, and what ``func`` returned into tensors, batch first."""
