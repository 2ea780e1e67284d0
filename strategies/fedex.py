"""FedEx-LoRA: FedAvg, and what it misses of the products goes into the base (arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from samaritan.models.adapter import AdapterState
from strategies.fedavg import fedavg
from strategies.products import Term, dense, products_of
from strategies.update import Situation, Update


def fedex(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """Averages A and B, and adds the ideal mean product less B A to the frozen layer.

    With c_i, A_i and B_i the terms of the ideal product and A, B their means, what is added is
    sum c_i (B_i - B) (A_i - A): it is small, and nothing cancels in computing it.

    Args:
        updates: Of equal ranks; LoRA is kept until the last has come.
        situation: An adapter with `folded` tensors.

    Returns:
        What to add, float32.
    """
    products, adapter = products_of(situation), situation.adapter

    def watched() -> Iterator[Update]:
        for update in updates:
            products.add(update)
            yield update

    step = fedavg(watched(), situation)
    for pair, terms in products.ideal():
        b, a = adapter[pair.b] + step[pair.b], adapter[pair.a] + step[pair.a]
        step[pair.folded] = dense([Term(t.weight, t.b - b, t.a - a) for t in terms])
    return step
