"""What each transform computes, how it is verified, and how its result is assembled."""
