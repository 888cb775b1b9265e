"""What makes good for INT4's error in the running model: low rank, looked-up tables, biases, chosen site by site.

``choose`` is the whole of it, step by step in its docstring; ``correction`` is what a site gets, ``cost`` what it takes; ``low_rank``,
``tables`` and ``bias`` fit; ``apply`` computes in torch what the runtime computes from the side file of ``files``.
"""
