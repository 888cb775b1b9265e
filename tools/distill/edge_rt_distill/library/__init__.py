"""The teacher library: parameter snapshots and what was recorded of them, content-addressed and safe for several writers.

``store`` is the folder, ``catalogue`` what is known of a record, ``care`` finds damage and collects; ``record`` and ``errors`` record, by
way of ``shards`` that a killed recording goes on with; ``recorded`` reads back; ``report`` and ``pictures`` show it; ``commands`` is
``edge-rt distill library``.
"""
