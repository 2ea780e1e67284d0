"""Which tensors of a decoder belong to one class, and so learn only where that class is labelled.

Both families have one output per class, background first: output i has row i of the mask tokens
and hypernetwork i of its own. All other tensors serve every class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

_MASK_TOKENS = "mask_decoder.mask_tokens.weight"
_HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."


def counts(
    shapes: Mapping[str, tuple[int, ...]], num_classes: int, labelled: Collection[int]
) -> dict[str, Tensor]:
    """Where a site's update says something, for `strategies.update.Update.counts`.

    The marginal loss moves the tensors of unlabelled classes too. All that this says is "not where
    another structure is labelled"; averaged with the sites that do label the class, it would only
    weaken what these have learned, so it is left out. Background counts everywhere. The rows of
    SAM's quality head are not among these tensors: no loss of ours trains them.

    Args:
        shapes: Of the adapter's tensors, by official name.
        num_classes: Structures of the study, background not counted.
        labelled: Class indices, from 1 on, that the site labels.

    Returns:
        Name -> 0 or 1, float32, () for a hypernetwork and (num_classes + 1, 1) for the mask tokens.
        Names that count in full are left out.
    """
    unlabelled = sorted(set(range(1, num_classes + 1)) - set(labelled))
    found: dict[str, Tensor] = {}
    if not unlabelled:
        return found
    for name in shapes:
        if name == _MASK_TOKENS:
            found[name] = torch.ones(num_classes + 1, 1)
            found[name][unlabelled] = 0
        elif name.startswith(_HYPERNETWORKS):
            index, _, _ = name.removeprefix(_HYPERNETWORKS).partition(".")
            if int(index) in unlabelled:
                found[name] = torch.zeros(())
    return found
