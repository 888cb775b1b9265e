"""Benchmarks against llama-cpp-python on the same machine: ``python -m bench``. What they showed: docs/performance.md."""
