"""How updates are written: number formats, sparsity, low rank, and one file format for all."""

from samaritan.codecs.fault import WireError
from samaritan.codecs.feedback import is_lossless, with_feedback
from samaritan.codecs.message import decode, encode

__all__ = ["WireError", "decode", "encode", "is_lossless", "with_feedback"]
