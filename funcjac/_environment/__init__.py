"""State of modules and random generators, and functions of torch's private API."""
