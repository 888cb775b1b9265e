"""What the fourth level learns from: answers of the teacher that can be verified.

``checks`` are what a program can verify, ``rewards`` what an answer gets for them; ``rollouts`` samples answers and makes of them
``examples`` to imitate and pairs to prefer; ``journal`` keeps them as they come.
"""
