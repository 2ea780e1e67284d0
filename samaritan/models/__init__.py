"""Base models, what is trained on them, and adapters as files."""
