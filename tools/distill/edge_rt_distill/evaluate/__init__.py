"""What a student is worth: ``measures`` on held-out sequences with standard errors, and the ``evaluator`` whose composite score stops the
levels, which may be the user's own.
"""
