"""A batch cut into parts has the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import Parts, batch_gradients, batch_parts


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads here, and as many as before for the tests after."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3, 1))


def test_parts_give_the_gradient_of_the_whole_batch() -> None:
    model = network()
    unused = nn.Parameter(torch.ones(2))
    trained = [*model.parameters(), unused]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 2, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (5, 8, 8), generator=generator)
    loss_of = SegmentationLoss(0.5)
    whole = batch_gradients(model, loss_of, images, labels, trained, Parts(1, None))
    expected = [None if p.grad is None else p.grad.clone() for p in trained]
    with batch_parts(torch.device("cpu"), 5) as parts:
        assert parts.count == 2
        loss = batch_gradients(model, loss_of, images, labels, trained, parts)
    assert torch.allclose(loss, whole, rtol=1e-6)
    assert unused.grad is None
    for parameter, gradient in zip(model.parameters(), expected, strict=False):
        assert gradient is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-8)


def test_a_gradient_of_the_step_before_is_not_added() -> None:
    model = network()
    images, labels = torch.ones(2, 2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    trained = list(model.parameters())
    first, second = (
        batch_gradients(model, SegmentationLoss(0.5), images, labels, trained, Parts(1, None))
        and trained[0].grad.clone()
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_threads_are_given_back_and_batches_of_one_are_not_cut() -> None:
    with batch_parts(torch.device("cpu"), 4) as parts:
        assert parts.pool is not None
        assert parts.pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2
    with batch_parts(torch.device("cpu"), 1) as parts:
        assert parts == Parts(1, None)
