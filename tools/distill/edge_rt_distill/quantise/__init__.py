"""Weights into INT4.

``matrices.quantise_model`` goes through a model layer by layer (``walk``) and turns each matrix into the bytes that ``export`` writes:
plain, by importance, or by ``gptq``; ``statistics`` is what goes into a matrix, ``formats`` are ggml's blocks in torch, ``qat`` is
training that computes with what the bytes will decode to.
"""
