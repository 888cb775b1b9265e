"""Benchmarks of post-processing inside the stream."""
