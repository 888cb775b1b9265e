"""Replay: recorded or generated requests sent again to an engine, and what its service was like (docs/replay.md)."""
