"""The teacher's and the student's model in torch, and what every other folder gives it and takes from it.

``decoder`` is the model, named as GGUF names its tensors; ``load`` reads one (GGUF, or a Hugging Face folder, which ``snapshot`` writes)
with its ``tokens``; ``rows`` are the sequences it is given; ``divergence`` is how far two models are from each other, ``logits`` keeps
what that takes small; ``generate`` lets a model answer. This folder imports none of the others.
"""
