"""Measures on held-out data, and the evaluator whose score ends a run."""
