"""What surrounds a call: the state of modules and generators, and torch's private API."""
