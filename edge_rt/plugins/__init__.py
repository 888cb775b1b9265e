"""Built-in plugins. Each is registered by an entry point, exactly as a stranger's, and imports only ``edge_rt.hooks``."""
