"""A whole run, from one TOML file: steps that resume where they were interrupted."""
