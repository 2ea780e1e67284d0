"""The products B A of a round, kept as factors.

A weighted sum of products is one product of stacked factors, [c1 B1, c2 B2, ..] [A1; A2; ..], so
that averaging products needs no matrix of the adapted layer's size.

Legend: o outputs and i inputs of the adapted layer, r LoRA rank, n columns of stacked factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from samaritan.models.adapter import AdapterState
from samaritan.models.lora import Pair, lora_pairs
from samaritan.shares import shares
from strategies.update import Situation, Update

_RESOLUTION = 1e-6
"""Singular values below this share of the largest are rounding noise of float32 factors."""


class Term(NamedTuple):
    """c B A, one part of a sum of products; b is (o, r), a is (r, i)."""

    weight: float
    b: Tensor
    a: Tensor


class Products:
    """The LoRA of a round's updates; it is kept until the round is combined.

    Args:
        adapter: The server's.
        personal: Tensors that sites keep for themselves. A product with such a factor is unknown
            and left out; a factor that a site does not send for another reason did not change.
    """

    def __init__(self, adapter: AdapterState, personal: Collection[str] = ()) -> None:
        self.adapter = adapter
        pairs = lora_pairs(adapter)
        self.pairs = [p for p in pairs if p.a not in personal and p.b not in personal]
        self._names = {name for pair in self.pairs for name in (pair.a, pair.b)}
        self._updates: list[Update] = []

    def add(self, update: Update) -> Update:
        """Keeps an update's LoRA and returns the rest."""
        start = {name: update.start[name] for name in self._names}
        lora = {name: t for name, t in update.delta.items() if name in self._names}
        rest = {name: t for name, t in update.delta.items() if name not in self._names}
        self._updates.append(replace(update, start=start, delta=lora))
        return replace(update, delta=rest)

    def ideal(self) -> Iterator[tuple[Pair, list[Term]]]:
        """The new product that loses nothing, B A + sum w_i (B_i A_i - B0_i A0_i) / sum w_i.

        A and B are the server's, A0_i and B0_i what a site was sent, A_i and B_i what it made of
        them; their ranks may differ. Weights of the terms sum to one. Nothing without an update.
        """
        for pair in self.pairs if self._updates else ():
            yield pair, self._terms(pair)

    def _terms(self, pair: Pair) -> list[Term]:
        total, ends = 0.0, []
        starts = [Term(0.0, self.adapter[pair.b], self.adapter[pair.a])]
        for update in self._updates:
            begun = Term(update.weight, update.start[pair.b], update.start[pair.a])
            ends.append(
                Term(
                    update.weight,
                    begun.b + update.delta.get(pair.b, 0),
                    begun.a + update.delta.get(pair.a, 0),
                )
            )
            total += update.weight
            _gather(starts, begun)
        # Where every site began at the server's adapter, it cancels out exactly.
        weights = [total - starts[0].weight, *(-start.weight for start in starts[1:])]
        terms = [*ends, *(t._replace(weight=w) for t, w in zip(starts, weights, strict=True) if w)]
        return [term._replace(weight=term.weight / total) for term in terms]


def _gather(starts: list[Term], begun: Term) -> None:
    """Adds a start to those that are equal."""
    for index, start in enumerate(starts):
        if _equal(start.b, begun.b) and _equal(start.a, begun.a):
            starts[index] = start._replace(weight=start.weight + begun.weight)
            return
    starts.append(begun)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)


def products_of(situation: Situation) -> Products:
    """An empty collection for the round."""
    adapter = situation.adapter
    return Products(adapter, shares(situation.config, adapter, situation.server_round).personal)


def stacked(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Factors (o, n) and (n, i) of the sum of the terms."""
    return torch.cat([t.weight * t.b for t in terms], 1), torch.cat([t.a for t in terms])


def dense(terms: Sequence[Term]) -> Tensor:
    """The sum of the terms, (o, i)."""
    left, right = stacked(terms)
    return left @ right


def factorised(
    terms: Sequence[Term], rank: int, b_before: Tensor, a_before: Tensor
) -> tuple[Tensor, Tensor]:
    """The best approximation of a sum of products by one of smaller rank.

    B and A are of equal size in every direction, and turned so that they are near to the former
    ones: any orthogonal Q gives the same product as B Q', Q A, but what a server's optimiser and a
    codec keep from round to round refers to the numbers in A and B, which shall not jump. Where the
    product has a lower rank, the directions left over keep the former A, with B at zero: with both
    at zero they could never learn again.

    Args:
        terms: What to approximate.
        rank: Wanted rank r.
        b_before: (o, r).
        a_before: (r, i).

    Returns:
        B (o, r) and A (r, i), float32.
    """
    left, right = stacked(terms)
    size = min(left.shape)
    reflections, scales = torch.geqrf(left)  # left = Q core; Q itself is never needed
    core, right_64 = reflections[:size].triu().double(), right.double()
    # With P the sum, Q' P P' Q is small, and its eigenvectors give P's left singular vectors.
    squares, vectors = torch.linalg.eigh(core @ (right_64 @ right_64.T) @ core.T)
    values = squares.clamp(min=0).sqrt()  # ascending
    kept = min(rank, int((values > _RESOLUTION * values[-1]).sum()))
    roots, u = values[size - kept :].sqrt(), vectors[:, size - kept :]
    b = torch.zeros(len(left), kept)
    b[:size] = (u * roots).float()
    b = torch.ormqr(reflections[:, :size], scales, b)
    a = ((u / roots).T @ core).float() @ right
    # Orthogonal Procrustes: the Q (r, kept) that brings Q a and b Q' nearest to the former ones.
    ours, _, theirs = torch.linalg.svd(a_before @ a.T + b_before.T @ b, full_matrices=False)
    turn = ours @ theirs
    return b @ turn.T, a_before + turn @ (a - turn.T @ a_before)
