"""An audit as text for a person and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from samaritan.privacy.audit.verdict import Audit, Bound

LIMITS = (
    "One-run bounds cannot be tight: canaries disturb each other, and a bound far below the claim "
    "is what a right implementation gives.",
    "The bound saturates: with every guess right it still shows no more than the largest "
    "detectable epsilon.",
    "An audit contradicts a claim or fails to; it never verifies an epsilon.",
    "The Gaussian indicator and the f-DP bound take losses to be like those of Gaussian noise.",
    "Audited are sampling, clipping, summing, noise and divisor on made-up patients; not the "
    "gradients of a model, a moving clipping norm, or anything else that is released.",
)
"""Part of every report."""


def as_text(audit: Audit) -> str:
    """Some twenty-five lines."""
    claim, step = audit.claim, audit.claim.mechanism
    lines = [
        f"claimed      epsilon {claim.epsilon:.3f}, delta {claim.delta:g}, unit {claim.unit}, "
        "adjacency add/remove one",
        f"mechanism    Gaussian, noise multiplier {step.noise_multiplier:.4f}, clipping norm "
        f"{step.clip_norm:g}",
        f"sampling     {_sampling(audit)}, {claim.steps} steps",
        f"experiment   {audit.canaries} canaries of {claim.slices} slices, {audit.correct} of "
        f"{audit.guesses} guesses right (fixed beforehand)",
        f"commitment   SHA-256 {audit.commitment}",
        "",
        "epsilon is at least     at 95 %   at 99.9 % (decides)",
    ]
    for bound in (*audit.bounds, audit.largest_detectable):
        mute = "" if bound.votes else "   scores are not normal: has no vote"
        lines.append(f"  {bound.method:20}  {bound.reported:7.2f}   {bound.deciding:7.2f}{mute}")
    lines += [
        f"  scores normal: p {audit.separation.normal_p:.3f}",
        "",
    ]
    for check in audit.checks:
        lines += [
            f"{'ok    ' if check.passed else 'FAILED'}  {check.name}",
            f"        {check.measured}",
        ]
    lines += ["", f"{audit.verdict}  ({audit.seconds:.1f} s)"]
    lines += [f"  {reason}" for reason in audit.violations or audit.doubts]
    if audit.verdict == "CONSISTENT":
        lines.append("  nothing contradicts the claim, which is not to say that it is true")
    return "\n".join([*lines, "", *(f"note: {limit}" for limit in LIMITS)])


def as_values(audit: Audit) -> dict[str, Any]:
    """For JSON: the text's numbers in full, and what opens the commitment."""
    claim = audit.claim
    return {
        "mode": "mechanism",
        "verdict": audit.verdict,
        "violations": audit.violations,
        "doubts": audit.doubts,
        "claimed": {
            "epsilon": claim.epsilon,
            "delta": claim.delta,
            "unit": claim.unit,
            "adjacency": "add/remove one",
            "sampling": _sampling(audit),
            "mechanism": {"kind": "gaussian", **asdict(claim.mechanism)},
            "steps": claim.steps,
            "accountant": "privacy loss distributions (dp-accounting)",
        },
        "canaries": audit.canaries,
        "slices_per_canary": claim.slices,
        "guesses": {"made": audit.guesses, "correct": audit.correct, "fixed_beforehand": True},
        "commitment": {
            "sha256": audit.commitment,
            "of": "nonce, then the coins packed eight to a byte",
            "nonce": audit.nonce,
            "coins": audit.coins,
        },
        "epsilon_at_least": [_values(bound) for bound in audit.bounds],
        "gaussian_indicator": asdict(audit.separation),
        "largest_detectable_epsilon": _values(audit.largest_detectable),
        "checks": [asdict(check) for check in audit.checks],
        "limits": list(LIMITS),
        "seconds": audit.seconds,
    }


def _values(bound: Bound) -> dict[str, Any]:
    return {
        "method": bound.method,
        "at_95_percent": bound.reported,
        "at_99.9_percent": bound.deciding,
        "votes": bound.votes,
    }


def _sampling(audit: Audit) -> str:
    rate = audit.claim.mechanism.sampling_rate
    return "none, every record in every step" if rate == 1 else f"Poisson at rate {rate:g}"
