"""Weights into INT4: importance, GPTQ, training that knows of it."""
