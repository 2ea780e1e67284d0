"""The coordinating side: rounds, checkpoints, events."""
