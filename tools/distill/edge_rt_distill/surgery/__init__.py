"""From a teacher, its diagnosis and a budget to a smaller architecture with the teacher's weights, repaired by least squares.

``plan`` searches among ``outline``s by what ``predict`` says they lose and ``cost`` says they take; ``probe`` makes small cuts to set
that right, and compares the best. A ``cut`` is data: ``apply`` makes a model of it and ``repair`` refits its matrices. ``reparam`` gives
matrices richer forms for training, which fold into one exactly.
"""
