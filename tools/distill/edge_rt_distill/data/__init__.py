"""From the user's files to batches of tokens.

``samples`` and ``records`` read JSONL and text, each sample with where it came from and the ``checks`` of its answer; ``dedupe`` and
``splits`` keep training and evaluation apart; ``batches`` tokenises (which predictions count is decided there) and makes the batches of
an epoch, which are a function of its number. ``demo`` is the set that ships: eight domains, English and Chinese.
"""
