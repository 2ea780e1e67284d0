"""FLAP-SAM's rule: the mean of products, brought back to the adapter's rank (arXiv 2407.21739).

FLAP-SAM decomposes the (o, i) matrices by a randomised SVD and puts all singular values into A.
Here the factors are stacked, which is exact and faster, and A and B share the singular values.
"""

from __future__ import annotations

from collections.abc import Iterable

from samaritan.models.adapter import AdapterState
from strategies.fedavg import fedavg
from strategies.products import factorised, products_of
from strategies.update import Situation, Update


def svd(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """Replaces each product by the nearest one of its rank to the ideal mean; the rest as FedAvg.

    Sites may have smaller ranks. With one site the product equals FedAvg's; A and B themselves are
    another pair of the same product.

    Args:
        updates: LoRA is kept until the last has come.
        situation: The adapter decides the ranks.

    Returns:
        What to add, float32.
    """
    products, adapter = products_of(situation), situation.adapter
    step = fedavg(map(products.add, updates), situation)
    for pair, terms in products.ideal():
        a_before, b_before = adapter[pair.a], adapter[pair.b]
        b, a = factorised(terms, len(a_before), b_before, a_before)
        step[pair.a], step[pair.b] = a - a_before, b - b_before
    return step
