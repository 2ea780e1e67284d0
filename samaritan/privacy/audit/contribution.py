"""What one patient can add to a release, and by what a sum is divided."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from scipy.stats import chi2
from torch import Tensor

from samaritan.privacy.audit.canaries import BuildStep
from samaritan.privacy.audit.check import P_FAILS, Check, noise_alone
from samaritan.privacy.mechanism import Mechanism

_ROUNDING = 1e-5
"""Relative, of float32 releases."""

_NOISE_SIZE = 20_000
"""Noise by which a divisor of 15 and one of 16 are told apart at 13 standard errors."""


def contribution_checks(
    build: BuildStep, mechanism: Mechanism, slices: int, sizes: tuple[int, ...]
) -> list[Check]:
    """Every check of contributions.

    Args:
        build: The implementation under audit.
        mechanism: As claimed.
        slices: Of each patient.
        sizes: Numbers of patients among which the divisor must not change.
    """
    return [
        longest_contribution(build, mechanism, slices),
        public_divisor(build, mechanism, slices, sizes),
    ]


def longest_contribution(build: BuildStep, mechanism: Mechanism, slices: int) -> Check:
    """The longest trace that a hostile patient leaves, seen without noise."""
    bare = replace(mechanism, sampling_rate=1.0, noise_multiplier=0.0)
    lengths = []
    for gradients in _hostile(slices, 1e3 * mechanism.clip_norm):

        def one_patient(_: int, gradients: Tensor = gradients) -> Tensor:
            return gradients

        released = build(bare)([0], one_patient, gradients.shape[1]).double()
        length = float(released.norm()) * mechanism.expected_records / mechanism.clip_norm
        lengths.append(length if math.isfinite(length) else math.inf)
    return Check(
        "one patient adds no more than the clipping norm, whatever its slices hold",
        max(lengths) <= 1 + _ROUNDING,
        f"{max(lengths):.4f} clipping norms at most",
    )


def public_divisor(
    build: BuildStep, mechanism: Mechanism, slices: int, sizes: tuple[int, ...]
) -> Check:
    """Neither a patient's share nor the noise changes with one patient more or fewer."""
    bare = replace(mechanism, sampling_rate=1.0, noise_multiplier=0.0)
    unit = mechanism.expected_records / mechanism.clip_norm

    def one_with_gradient(patient: int) -> Tensor:
        return torch.full((slices, 1), 3 * mechanism.clip_norm if patient == 0 else 0.0)

    shares, spreads, p_values = [], [], []
    for patients in sizes:
        shares.append(float(build(bare)(range(patients), one_with_gradient, 1)) * unit)
        noise = noise_alone(build, mechanism, 1, _NOISE_SIZE, patients)
        spreads.append(float(noise.std()))
        squares = float((noise**2).sum())
        below, above = chi2.cdf(squares, noise.size), chi2.sf(squares, noise.size)
        p_values.append(2 * min(float(below), float(above)))
    return Check(
        "the divisor is a public constant",
        all(abs(share - 1) <= _ROUNDING for share in shares)
        and len(sizes) * min(p_values) >= P_FAILS,
        "; ".join(
            f"share {share:.4f}, noise {spread:.3f} of the promised with {patients}"
            for share, spread, patients in zip(shares, spreads, sizes, strict=True)
        ),
    )


def _hostile(slices: int, length: float) -> list[Tensor]:
    """(slices, size) gradients: along one line, each in its own direction, broken, overflowing."""
    along, apart, broken = (torch.zeros(slices, slices) for _ in range(3))
    along[:, 0] = length
    apart.fill_diagonal_(length)
    broken[0] = math.nan
    return [along, apart, broken, torch.full((slices, slices), 1e38)]
