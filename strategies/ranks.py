"""What a site of a smaller rank is sent."""

from __future__ import annotations

from samaritan.models.adapter import AdapterState
from samaritan.models.lora import lora_pairs
from strategies.products import Term, factorised


def view(adapter: AdapterState, rank: int | None) -> AdapterState:
    """The adapter with LoRA of at most a rank: the best approximation of each product.

    Where a product is zero, A is cut to its first rows, as A must not be zero too.

    Args:
        adapter: The server's.
        rank: The site's; None for the server's own.

    Returns:
        Other tensors as they are; the adapter itself where there is nothing to cut.
    """
    larger = [p for p in lora_pairs(adapter) if rank is not None and len(adapter[p.a]) > rank]
    if rank is None or not larger:
        return adapter
    cut = dict(adapter)
    for pair in larger:
        b, a = adapter[pair.b], adapter[pair.a]
        cut[pair.b], cut[pair.a] = factorised([Term(1.0, b, a)], rank, b[:, :rank], a[:rank])
    return cut
