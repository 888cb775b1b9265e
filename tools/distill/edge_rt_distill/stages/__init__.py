"""Training by levels, each with a gate.

``trainer`` is the one loop; ``levels`` are data, ``terms`` makes a level's losses of a batch, ``gate`` judges held-out errors, ``state``
and ``checkpoint`` let a killed run go on to the same bits. ``teachers`` is what is seen of a teacher, ``material`` what is learnt from,
``guides`` what hidden states and attention are compared by.
"""
