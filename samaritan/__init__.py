"""Samaritan: hospitals fine-tune the Segment Anything Model together without sharing an image."""

__version__ = "0.1.0"
