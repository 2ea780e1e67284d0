"""FLoRA: the whole mean product goes into the base, and the adapters start anew (arXiv 2409.05976).

The paper's sites stack the factors of all sites and add the product themselves; here the server
does, and sends the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from samaritan.models.adapter import AdapterState
from samaritan.training.local import round_seed
from strategies.fedavg import fedavg
from strategies.products import dense, products_of
from strategies.update import Situation, Update


def flora(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """Adds the ideal mean product to the frozen layer; B becomes zero and A is drawn anew.

    Args:
        updates: Of any ranks; LoRA is kept until the last has come.
        situation: An adapter with `folded` tensors; seed and round decide A.

    Returns:
        What to add, float32.
    """
    products, adapter = products_of(situation), situation.adapter
    step = fedavg(map(products.add, updates), situation)
    for pair, terms in products.ideal():
        seed = round_seed(situation.config.seed, situation.server_round, pair.a)
        step[pair.folded] = dense(terms)
        step[pair.a] = _fresh(adapter[pair.a], seed) - adapter[pair.a]
        step[pair.b] = -adapter[pair.b]
    return step


def _fresh(a: Tensor, seed: int) -> Tensor:
    """A new A of the same shape, drawn as peft draws it."""
    generator = torch.Generator().manual_seed(seed)
    return nn.init.kaiming_uniform_(torch.empty_like(a), a=math.sqrt(5), generator=generator)
