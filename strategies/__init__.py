"""How updates are combined."""
