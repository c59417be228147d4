"""From the user's arguments to a call, and from results back to the user's trees."""
