"""Watching a kit at work: a page for people, /health, /status.json and /metrics, read-only."""
