"""The demonstration that ``python -m funcjac`` runs, with its data and networks."""
