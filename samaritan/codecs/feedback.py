"""Error feedback: what a codec leaves out of one message is added to the next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from samaritan.codecs.message import State, decode, encode
from samaritan.config import CodecConfig


def is_lossless(codec: CodecConfig) -> bool:
    """Whether every update arrives as it was sent."""
    return codec.numbers == "fp32" and codec.low_rank is None and codec.top_k in (None, 1)


def with_feedback(
    update: State,
    left_out: Mapping[str, Tensor],
    codec: CodecConfig,
    *,
    header: Mapping[str, str],
    seed: int,
) -> tuple[bytes, State]:
    """A message of the update and what earlier ones left out (arXiv 1809.07599, 1901.09847).

    Without it a number that is never among the largest is never sent; with it the sum of the
    messages follows the sum of the updates, and their difference is what is returned.

    Args:
        update: Any shapes.
        left_out: Of the message before; empty at first. Absent names count as zero, and names that
            are not in this update wait for one that has them.
        codec: How it is written.
        header: As `encode` takes it.
        seed: As `encode` takes it.

    Returns:
        The message, and what to give the next call; float32, without the names of this update if
        the codec is lossless.

    Raises:
        WireError: For a number that is not finite.
    """
    wanted = {
        name: value.detach().cpu().float() + left_out.get(name, 0.0)
        for name, value in update.items()
    }
    data = encode(wanted, codec, header=header, seed=seed)
    waiting = {name: value for name, value in left_out.items() if name not in update}
    if is_lossless(codec):
        return data, waiting
    sent, _ = decode(data, {name: tuple(value.shape) for name, value in wanted.items()})
    return data, waiting | {name: wanted[name] - sent[name] for name in wanted}
