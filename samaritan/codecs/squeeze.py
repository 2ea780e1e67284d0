"""Small integers in fewer bits: most are near zero, and Huffman's code writes these shortly.

Measured on the steps of hippocampus runs: 3.8 bits instead of 4.3 for int4, with its scales.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from samaritan.codecs.fault import WireError

_WHOLE, _SHORT = "numbers", "squeezed"


def squeeze(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts of a message with their integers in a deflate stream, where that is shorter."""
    whole = parts[_WHOLE]
    # Without the search for repetitions, of which there are none: half the time, the same size.
    stream = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    short = stream.compress(whole.numpy().tobytes()) + stream.flush()
    if len(short) >= len(whole):
        return parts  # so that no message is longer than its receiver allows
    rest = {name: part for name, part in parts.items() if name != _WHOLE}
    return {**rest, _SHORT: torch.frombuffer(bytearray(short), dtype=torch.uint8)}


def unsqueeze(parts: dict[str, Tensor], dtype: torch.dtype, length: int) -> dict[str, Tensor]:
    """The inverse of `squeeze`.

    Args:
        parts: Of a message; those without a deflate stream come back as they are.
        dtype: One byte wide.
        length: How many integers there are; not a byte more is unpacked.

    Raises:
        WireError: When the stream is damaged or of another length.
    """
    if _SHORT not in parts:
        return parts
    if _WHOLE in parts or parts[_SHORT].dtype != torch.uint8:
        raise WireError("the message has other parts than its codec")
    stream = zlib.decompressobj()
    try:
        whole = stream.decompress(parts[_SHORT].numpy().tobytes(), length + 1)
    except zlib.error:
        raise WireError("the numbers of the message cannot be unpacked") from None
    if len(whole) != length or not stream.eof or stream.unused_data:
        raise WireError(f"{_WHOLE} is not {length} integers")
    rest = {name: part for name, part in parts.items() if name != _SHORT}
    return {**rest, _WHOLE: torch.frombuffer(bytearray(whole), dtype=dtype)}
