"""What of a teacher carries the value: measured on the user's samples, ranked and explained.

``diagnosis.diagnose`` does it in ``parts`` that are kept as they are done; ``measure`` says what those are; ``passes`` are the two ways
in which all of them look at the model: layer by layer, and once back without a weight's gradient. ``findings`` ranks, ``report`` shows.
What comes out, ``diagnosis.json`` and ``diagnosis.npz``, is what ``surgery`` reads.
"""
