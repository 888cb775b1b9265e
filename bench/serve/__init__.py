"""Benchmarks of the daemon: `edge-rt serve` as a process with a real model, and real clients at its sockets."""
