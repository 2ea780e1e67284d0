"""Volumes, datasets, geometry and slices."""
