"""The training loss: Dice and cross-entropy, each record on its own."""

from __future__ import annotations

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
    """

    def __init__(self, dice_weight: float) -> None:
        super().__init__()
        self.dice_weight = dice_weight
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
        dice: Tensor = self.dice(logits, labels[:, None])
        return self.dice_weight * dice + (1 - self.dice_weight) * F.cross_entropy(logits, labels)
