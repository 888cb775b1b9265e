"""How well context is kept: tasks, conversations and text, methods that keep a part of a context, and scores with intervals."""
