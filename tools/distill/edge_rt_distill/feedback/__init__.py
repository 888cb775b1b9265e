"""Feedback: what recorded traffic tells of answers that were not good, and what follows from it for the next student."""
