"""Recording what clients ask the daemon, and what became of it (docs/daemon.md)."""
