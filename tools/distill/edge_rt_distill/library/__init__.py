"""The teacher library: parameter snapshots and what was recorded of them, content-addressed."""
