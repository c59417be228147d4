"""funcjac inside libraries that others wrote; a library that is not installed is skipped."""
