"""How far a round's new products are from the ideal mean of the sites' products."""

from __future__ import annotations

from collections.abc import Collection
from statistics import fmean

from samaritan.models.adapter import AdapterState
from samaritan.models.lora import Pair
from strategies.products import Products, Term, dense
from strategies.update import Update


class ProductMeter:
    """The aggregation error of one round.

    It is ||B' A' + F' - F - P|| / ||P||, the mean over LoRA products, where A', B' and F' are the
    adapter after the round (F: what strategies fold into the frozen layer) and P is the ideal
    product (`Products.ideal`). Sums are dense and in float64, so that float32 rounding (1e-7) can
    be told from loss.

    Args:
        before: The server's adapter before the round.
        personal: Tensors that sites keep for themselves; their products cannot be known.
    """

    def __init__(self, before: AdapterState, personal: Collection[str] = ()) -> None:
        self._products = Products(before, personal)
        self._changed = False

    def add(self, update: Update) -> None:
        """Takes in an update; its LoRA is kept."""
        rest = self._products.add(update)
        lora = update.delta.keys() - rest.delta.keys()
        self._changed |= any(bool(update.delta[name].any()) for name in lora)

    def error(self, after: AdapterState) -> float | None:
        """The error of an adapter as the new one; 0 where no site changed anything.

        Returns:
            None where it cannot be known: no update, no LoRA, or a factor of each product is
            personal.
        """
        errors = [self._error(pair, terms, after) for pair, terms in self._products.ideal()]
        if not errors:
            return None
        return fmean(errors) if self._changed else 0.0

    def _error(self, pair: Pair, terms: list[Term], after: AdapterState) -> float:
        ideal = dense([Term(t.weight, t.b.double(), t.a.double()) for t in terms])
        found = after[pair.b].double() @ after[pair.a].double()
        before = self._products.adapter
        if pair.folded in before:
            found += after[pair.folded].double() - before[pair.folded].double()
        size = ideal.norm().item()
        return (found - ideal).norm().item() / size if size else 0.0
