"""What a ledger charges: a round's mechanism in numbers, to a record and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from samaritan.errors import PrivacyError
from samaritan.privacy.accounting import Epsilon, Spending
from samaritan.privacy.ledger.records import Record


@dataclass(frozen=True)
class Question:
    """What a site was asked; the same question gets the same answer.

    Attributes:
        plan_hash: Of the study's configuration.
        server_round: Its number.
        model_in_hash: Of the adapter the site starts from.
    """

    plan_hash: str
    server_round: int
    model_in_hash: str


@dataclass(frozen=True)
class Charge:
    """What a round will cost. Every value is public or chosen in public: none is counted from data.

    Attributes:
        question: What the round answers.
        run_id: For people; budgets do not depend on it.
        budget: Epsilon that the cohort may not exceed with this round.
        delta: At which epsilon is counted.
        noise_multiplier: Standard deviation of the noise over `clip_norm`.
        clip_norm: Longest vector of one record.
        sampling_rate: Poisson; 1 where nothing is sampled.
        steps: All that are planned.
        records_public: Published number of records.
        slices_per_patient: Most that one patient adds to a step; None where the unit has no such
            cap.
        unit: "patient" or "slice".
        clip_scope: What is clipped as one vector.
        rng: Kind, library and version of the source of the noise.
        code_hash: Of the installed program.
        other_releases: What else leaves the site with the answer, such as noisy counts, by name;
            charged too.
    """

    question: Question
    run_id: str
    budget: float
    delta: float
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    steps: int
    records_public: int
    slices_per_patient: int | None = None
    unit: str = "patient"
    clip_scope: str = "all trained tensors"
    rng: Mapping[str, str] = field(default_factory=dict)
    code_hash: str = ""
    other_releases: Mapping[str, Spending] = field(default_factory=dict)

    @property
    def spendings(self) -> list[Spending]:
        """The steps, and everything else that is released."""
        steps = Spending(self.sampling_rate, self.noise_multiplier, self.steps)
        return [steps, *self.other_releases.values()]


def charge_fields(charge: Charge, before: Epsilon, after: Epsilon) -> Record:
    """What a reservation says of its charge."""
    return {
        **question_fields(charge.question),
        "run_id": charge.run_id,
        "unit": charge.unit,
        "adjacency": "add/remove",
        "mechanism": "gaussian",
        "n_patients_public": charge.records_public,
        "max_windows_per_patient": charge.slices_per_patient,
        "delta": repr(float(charge.delta)),
        "clip_C": repr(float(charge.clip_norm)),
        "clip_scope": charge.clip_scope,
        **_spending_fields(charge.spendings[0]),
        "other_releases": [
            {"name": name, "mechanism": "gaussian", **_spending_fields(spent)}
            for name, spent in sorted(charge.other_releases.items())
        ],
        "rng": dict(charge.rng),
        "code_hash": charge.code_hash,
        "accountant": {
            "name": "dp-accounting PLD, Opacus RDP",
            "version": f"{version('dp-accounting')}, {version('opacus')}",
            "eps_before": repr(before.pld),
            "eps_after": repr(after.pld),
            "eps_rdp": repr(after.rdp),
        },
        "budget_eps": repr(float(charge.budget)),
    }


def question_fields(question: Question) -> Record:
    """How a record names a question."""
    return {
        "plan_hash": question.plan_hash,
        "round": question.server_round,
        "model_in_hash": question.model_in_hash,
    }


def external_fields(spendings: Sequence[Spending]) -> Record:
    """What a charge for lost or foreign records says.

    Raises:
        PrivacyError: SAM-P108 for what no accountant can count.
    """
    _check_spendings(spendings)
    return {"spent": [_spending_fields(spent) for spent in spendings]}


def spendings_of(record: Record) -> list[Spending]:
    """What a record charges; nothing for most types."""
    if record["type"] == "reserve":
        entries = [record, *record["other_releases"]]
    else:
        entries = record["spent"] if record["type"] == "external" else []
    return [
        Spending(float(entry["sampling"]), float(entry["sigma"]), entry["steps_planned"])
        for entry in entries
    ]


def check_charge(charge: Charge) -> None:
    """Refuses what no accountant can count.

    Raises:
        PrivacyError: SAM-P108 with the value.
    """
    _check_spendings(charge.spendings)
    if not 0 < charge.delta < 1 / max(1, charge.records_public):
        raise _invalid(f"delta {charge.delta} of {charge.records_public} records")
    for name in ("budget", "clip_norm"):
        if not 0 < getattr(charge, name) < math.inf:
            raise _invalid(f"{name} {getattr(charge, name)}")


def _check_spendings(spendings: Sequence[Spending]) -> None:
    for spent in spendings:
        if not (
            0 < spent.sampling_rate <= 1
            and 0 < spent.noise_multiplier < math.inf
            and isinstance(spent.steps, int)
            and spent.steps > 0
        ):
            raise _invalid(str(spent))


def _invalid(what: str) -> PrivacyError:
    return PrivacyError(
        "SAM-P108",
        f"the ledger cannot charge {what}",
        "Rates lie above 0 and up to 1, delta below 1 / records; noise, clipping norm, steps and "
        "budget are positive and finite.",
    )


def _spending_fields(spent: Spending) -> Record:
    return {
        "sampling": repr(float(spent.sampling_rate)),
        "sigma": repr(float(spent.noise_multiplier)),
        "steps_planned": spent.steps,
    }
