"""The training loss: Dice and cross-entropy, each record on its own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

_SMOOTH = 4.0
"""Pixels added to both sides of the Dice quotient. A structure that is absent from a slice then
costs little where little of it is predicted, instead of everything for a single pixel."""


class SegmentationLoss(nn.Module):
    """w * Dice + (1 - w) * cross-entropy; FLAP-SAM uses w = 0.8 (arXiv 2407.21739).

    Both terms are means over records of a record's own loss, so that no record's gradient depends
    on another; a Dice over the whole batch would couple them and break per-record privacy.

    Where structures are not labelled, it is the marginal loss (arXiv 2007.03868): background then
    means "background or one of these", and has the sum of their probabilities. No structure is
    punished for being found where nobody looked for it.

    Args:
        dice_weight: w.
        unlabelled: Class indices, from 1 on, that the labels do not tell from background.
    """

    def __init__(self, dice_weight: float, unlabelled: Collection[int] = ()) -> None:
        super().__init__()
        self.dice_weight, self.unlabelled = dice_weight, frozenset(unlabelled)
        self.dice = DiceLoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            smooth_nr=_SMOOTH,
            smooth_dr=_SMOOTH,
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss.

        Args:
            logits: (B, classes + 1, H, W), background first.
            labels: (B, H, W) int64 class indices.
        """
        if self.unlabelled:
            logits, labels = marginal(logits, labels, self.unlabelled)
        dice: Tensor = self.dice(logits, labels[:, None])
        return self.dice_weight * dice + (1 - self.dice_weight) * F.cross_entropy(logits, labels)


def marginal(
    logits: Tensor, labels: Tensor, unlabelled: Collection[int]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adds the probabilities of unlabelled classes to that of background.

    Args:
        logits: (B, classes + 1, ...), background first.
        labels: (B, ...) int64 class indices, none of them unlabelled.
        unlabelled: Class indices.

    Returns:
        Logits (B, labelled classes + 1, ...), whose softmax is that of all classes with the sum
        first, and labels as indices into them.
    """
    labelled = [index for index in range(1, logits.shape[1]) if index not in unlabelled]
    background = logits[:, [0, *sorted(unlabelled)]].logsumexp(1, keepdim=True)
    position = torch.zeros(logits.shape[1], dtype=torch.long, device=labels.device)
    position[labelled] = torch.arange(1, len(labelled) + 1, device=labels.device)
    return torch.cat([background, logits[:, labelled]], 1), position[labels]
