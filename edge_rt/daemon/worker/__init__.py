"""The worker process, which owns a model: sessions, memory, requests under way."""
