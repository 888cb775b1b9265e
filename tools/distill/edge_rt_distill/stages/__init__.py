"""Training by levels, each with a gate."""
