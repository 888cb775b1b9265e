"""What the fourth level learns from: answers of the teacher that can be verified.

``rewards`` are what an answer gets for its sample's checks (``data.checks``); ``rollouts`` samples answers and makes of them ``examples``
to imitate and pairs to prefer; ``journal`` keeps them as they come.
"""
