"""A whole run, from one TOML file (``config``): steps that resume where they were interrupted.

``steps`` does any steps, each once; ``pipeline`` says which there are; ``prepare``, ``study``, ``shape``, ``teach`` and ``deliver`` are
they, made of the other folders; ``ablate`` teaches with fewer levels; ``report`` writes the page. Nothing else imports this folder.
"""
