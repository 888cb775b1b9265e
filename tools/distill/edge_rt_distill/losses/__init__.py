"""The losses of the four levels of distillation, as pure functions of tensors: ``token``, ``hidden``, ``attention``, ``behaviour``;
``balance`` adds terms of different units. What they are computed from, when and for how long, is ``stages``' business.
"""
