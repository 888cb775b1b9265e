"""The on-device daemon: one process that many programs share, over a local socket."""
