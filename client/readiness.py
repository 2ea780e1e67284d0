"""Whether a site could work on its studies: data, plans, memory."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from client.approvals import Approvals, require_member, roles_of
from client.home import site_identity
from client.permissions import Users
from client.settings import SiteSettings
from samaritan import __version__
from samaritan.audit.policy import require_agreement
from samaritan.data.datasets import TRAIN, Dataset, scan_dataset
from samaritan.errors import SamaritanError
from samaritan.models.count import count_trained, trained_shapes
from samaritan.models.memory import require_memory
from samaritan.operate.checks.finding import Finding, fault, fine, missing, note
from samaritan.operate.checks.plans import current_plan
from samaritan.operate.checks.users import ENTER, READ, User, has_acl, this_user
from samaritan.plan import Plan
from samaritan.provision.kit import Kit

_LISTS = ("manifest.csv", "dataset.json")
_BYTES_PER_PARAMETER, _BESIDE = 4, 2**30
"""What the frozen base takes on a GPU at the least."""


def data(settings: SiteSettings, users: Users) -> Iterator[Finding]:
    """The list of cases, and who can read them; no image is opened."""
    root = Path(settings.data)
    agent, courier = users.agent, users.courier
    if this_user().uid not in (0, agent.uid):
        yield note(
            "data", f"are {agent.name}'s; they were not looked at", f"Look as root or {agent.name}."
        )
        return
    if not agent.may(root, READ | ENTER):
        yield missing(
            "data",
            "SAM-N652",
            f"{root} does not exist"
            if agent.uid == 0 or _seen(root)
            else f"{root} cannot be read by {agent.name}, or does not exist",
            f"Set `data` in site.yaml; {agent.name} must be able to read the folder and to enter "
            "all folders above it.",
        )
        return
    try:
        dataset, faults = scan_dataset(root)
    except SamaritanError as error:
        yield fault("data", error)
        return
    except OSError as error:
        yield missing("data", "SAM-N652", f"{error.filename}: {error.strerror}", "Mend its mode.")
        return
    if faults:
        yield missing(
            "data",
            faults[0][1].code,
            f"{len(faults)} entries are wrong; the first: {faults[0][1].message}",
            f"samaritan data check {root}",
        )
    shut = [path for path in _files(dataset) if not agent.may(path, READ)]
    if shut:
        yield missing(
            "data",
            "SAM-N652",
            f"{len(shut)} of the files listed cannot be read by {agent.name}, among them one in "
            f"{shut[0].parent}",
            f"Let {agent.name} read them.",
        )
    elif not faults:
        patients = len({case.subject_id for case in dataset.cases})
        train = sum(case.split == TRAIN for case in dataset.cases)
        yield fine(
            "data",
            f"{len(dataset.cases)} cases of {patients} patients, {train} marked for training; "
            "`samaritan data check` opens the images too",
        )
    if users.are_two:
        yield from _kept_from(courier, root, dataset)


def _kept_from(courier: User, root: Path, dataset: Dataset) -> Iterator[Finding]:
    what = "data and the courier"
    lists = [root / name for name in _LISTS]
    open_files = [path for path in (*lists, *_files(dataset)) if courier.may(path, READ)]
    if open_files or courier.may(root, READ | ENTER):
        yield missing(
            what,
            "SAM-N653",
            f"{courier.name} can read {len(open_files)} files in {root}"
            if open_files
            else f"{courier.name} can list {root}",
            f"chmod o-rwx {root}, and take {courier.name} out of its group.",
        )
    elif has_acl(root):
        yield note(
            what,
            f"{root} has an access control list, which is not read here",
            f"`getfacl {root}` shows whether it lets {courier.name} in.",
            "SAM-N650",
        )
    else:
        yield fine(what, f"{courier.name} cannot read them")


def plans(kit: Kit, settings: SiteSettings) -> Generator[Finding, None, list[Plan]]:
    """The plans people here have approved; returns those that this site may work on now."""
    key = kit.path("identity.key")
    if key.is_file() and not os.access(key, os.R_OK):
        yield note("plans", "this user cannot read the key of the site", "Look as root.")
        return []
    try:
        identity = site_identity(kit)
        approvals = Approvals(kit, roles_of(settings.policy, identity))
        known = approvals.known()
        node_key = kit.path("node.pub").read_text("utf-8")
    except SamaritanError as error:
        yield fault("plans", error)
        return []
    except OSError as error:
        yield note("plans", f"{error.filename}: {error.strerror}", "Look as root.")
        return []
    if not known:
        yield note(
            "plans",
            "none was approved here yet",
            "Read the coordinator's plan (`samaritan plan show`) and approve it (`samaritan site "
            "approve`).",
        )
    agreed, signer = [], bytes.fromhex(kit.card.plan_signer)
    for sha256 in known:
        what = f"plan {sha256[:16]}"
        if lacking := approvals.missing(sha256):
            yield note(
                what,
                f"lacks the approval of {', '.join(lacking)}",
                "They approve it with `samaritan site approve`, with --role and --key.",
                "SAM-N656",
            )
            continue
        plan = current_plan(what, kit.path("plans", f"{sha256}.json"), signer)
        if isinstance(plan, Finding):
            yield plan
            continue
        if plan.samaritan != __version__:
            yield missing(
                what,
                "SAM-N658",
                f"study {plan.study} needs Samaritan {plan.samaritan}, and {__version__} is "
                "installed",
                "Install the plan's version, or ask for a plan for this one.",
            )
            continue
        try:
            require_member(plan, kit, identity, node_key)
            require_agreement(settings.policy, plan, tuple(trained_shapes(plan.config)))
        except SamaritanError as error:
            yield fault(what, error)
            continue
        yield fine(what, f"study {plan.study}, approved, valid until {plan.valid_until}")
        agreed.append(plan)
    return agreed


def memory(plan: Plan) -> Iterator[Finding]:
    """Whether the base of a plan fits into memory, and onto the GPU where there is one."""
    config = plan.config
    what = f"memory for {plan.study}"
    try:
        count = count_trained(
            config.model.base, config.peft.preset, config.peft.rank, len(config.data.classes or {})
        )
        require_memory(plan.base.name, count.parameters)
    except SamaritanError as error:
        yield fault(what, error)
        return
    needed = count.parameters * _BYTES_PER_PARAMETER
    yield fine(what, f"base {plan.base.name} takes {needed / 1e6:,.0f} MB; training takes more")
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if free < needed + _BESIDE:
            yield missing(
                f"GPU memory for {plan.study}",
                "SAM-N607",
                f"{free / 2**30:.1f} GiB are free, and base {plan.base.name} needs "
                f"{(needed + _BESIDE) / 2**30:.1f} GiB at the least",
                "End what else uses the GPU (`nvidia-smi` shows it), or take a larger one.",
            )
        else:
            yield fine(f"GPU memory for {plan.study}", f"{free / 2**30:.1f} GiB are free")


def _files(dataset: Dataset) -> list[Path]:
    images = [case.image for case in dataset.cases]
    return images + [case.label for case in dataset.cases if case.label is not None]


def _seen(path: Path) -> bool:
    """Whether this user can tell that a path does not exist."""
    try:
        return not path.exists()
    except OSError:
        return False
