"""The configuration of a run: YAML in, one frozen and hashed object out.

Unknown keys are faults, all faults are reported together, and the resolved form (every default
written out) is saved with each run. Nothing here can name code.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from samaritan.errors import ConfigError

_BRANCH = re.compile(r"constrained-|tuple\[")
"""What pydantic adds to a key that may hold one of several types."""

_LONGEST_VALUE = 100
"""Characters of a wrong value that a message repeats."""

Side = Annotated[int, Field(ge=16, le=2048)]


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The frozen base model."""

    base: str = "tiny"
    """A name from `samaritan models list`."""
    checkpoint: str | None = None
    """Checkpoint file (.pth or .safetensors); every base but `tiny` needs one, and `tiny` may have
    one that was trained on other data."""
    checkpoint_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Refuse any other file."""
    image_size: Side | tuple[Side, Side] | None = None
    """Model input in pixels, one side or [rows, columns]; the base's own when left out."""
    decoder: Literal["official", "reference"] = "official"
    """SAM's decoder (logits at a quarter of the input), or FLAP-SAM's (at full size)."""
    frozen_precision: Literal["fp32", "bf16"] = "fp32"
    """How frozen encoder weights are held; bf16 halves them, where the encoder computes in bf16."""


class PeftConfig(Section):
    """What is trained, and at which rank."""

    preset: str = "flap-sam"
    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0)
    """LoRA scale is alpha / rank; equal to the rank (scale 1) when left out."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """Plain LoRA, rank-stabilised (scale alpha / sqrt(rank)), or weight-decomposed (DoRA)."""
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Other ranks by group of layers, such as {decoder: 4} or {encoder.qkv: 16}."""
    blocks: int | None = Field(default=None, ge=0)
    """Adapt only the last so many encoder blocks; all of them when left out."""
    site_ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Sites that train with a smaller rank than `rank`, for the rules that combine products."""


class DataConfig(Section):
    """Where cases come from and how a volume becomes slices."""

    source: Literal["folder", "phantoms"] = "folder"
    sites: int = Field(default=4, ge=1, le=1000)
    """Number of sites of the phantom demo, or of a `uniform` partition."""
    cases_per_site: int = Field(default=8, ge=2, le=1000)
    """Phantom volumes made for each site."""
    partition: Literal["manifest", "uniform"] = "manifest"
    """Sites as the manifest names them, or pseudo-sites of equal size dealt out by patient."""
    classes: dict[str, int] | None = None
    """Structure name -> label value; read from dataset.json or the labels when left out."""
    site_classes: dict[str, dict[str, int]] = {}
    """Sites with a label map of their own, structure name -> label value in that site's files; a
    structure that it leaves out is not labelled there. Other sites use `classes`."""
    held_out_sites: tuple[str, ...] = ()
    """Sites that only score: they train nothing, and all their cases are validation cases."""
    val_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each site's patients held out where the dataset names no split."""
    slice_axis: Literal["auto", "sagittal", "coronal", "axial"] = "auto"
    pixel_mm: float | None = Field(default=None, gt=0)
    """Pixel size of the model grid; the longer side fills the input when left out."""
    context_slices: int = Field(default=3, ge=1, le=15)
    """Neighbouring slices given as channels (odd); 1 repeats the slice itself."""
    cache_mb: int = Field(default=2048, ge=1)
    """Memory for prepared cases, over all sites."""
    pseudo_sites: bool = False
    """True where the sites are parts of one hospital's data; said in every report."""
    note: str = ""

    @field_validator("context_slices")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the labelled slice is in the middle")
        return value

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        if value is not None and (
            not value or min(value.values()) < 1 or len(set(value.values())) != len(value)
        ):
            raise ValueError("needs one structure or more, with distinct label values from 1 on")
        # The order decides which output of the model a structure gets; equal hash, equal order.
        return value and dict(sorted(value.items(), key=lambda item: item[1]))


class TrainingConfig(Section):
    """Local training in one round at one site."""

    slices_per_case: float = Field(default=8, gt=0)
    """Slices drawn per training case in a round; sets the number of steps."""
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=5, ge=0)
    """Linear warm-up at the start of each round, as AdamW's moments start anew."""
    final_lr_fraction: float = Field(default=0.05, ge=0, le=1)
    """Cosine decay over all rounds ends at this share of the learning rate."""
    dice_weight: float = Field(default=0.8, ge=0, le=1)
    """Loss = dice_weight * Dice + (1 - dice_weight) * cross-entropy, per record."""
    clip_norm: float = Field(default=1.0, gt=0)
    proximal_mu: float = Field(default=0, ge=0)
    """FedProx: pulls a site towards the adapter it was sent by mu times the distance."""
    scaffold: bool = False
    """SCAFFOLD: sites correct their gradients by how they differ from the rest; twice the bytes.
    The control is the mean of a site's gradients in a round; under SGD that is the paper's option
    II, under AdamW our reading of it."""
    foreground_fraction: float = Field(default=0.8, ge=0, le=1)
    """Share of drawn slices that touch a labelled structure."""
    prompts: Literal["none", "box", "point", "mixed"] = "none"
    """What the model is told about where structures are, drawn from the labels with the jitter of
    SAM's training: one box around all, one point in each, or for each slice one of none, box and
    points."""
    flip: tuple[Literal["left-right", "anterior-posterior", "superior-inferior"], ...] = ()
    """Body axes mirrored at random."""
    rotate_degrees: float = Field(default=10.0, ge=0, le=180)
    scale_fraction: float = Field(default=0.1, ge=0, lt=1)
    shift_fraction: float = Field(default=0.05, ge=0, lt=1)
    intensity_fraction: float = Field(default=0.2, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    recompute: bool = False
    """Compute encoder blocks again in the backward pass: less memory, about a third more time."""
    prefix_cache_mb: int = Field(default=0, ge=0)
    """Disk space of each site for what frozen encoder blocks make of slices; 0 keeps nothing."""
    cached_views: int = Field(default=4, ge=1, le=1000)
    """Augmented views of a slice that training draws among where `prefix_cache_mb` is not 0."""


class CodecConfig(Section):
    """How tensors are written for the wire. The three parts apply in this order."""

    low_rank: int | None = Field(default=None, ge=1)
    """Matrices are sent as the product of two of this rank, where that is smaller."""
    top_k: float | None = Field(default=None, gt=0, le=1)
    """Only this share of the numbers is sent, the largest in magnitude; the others count as 0."""
    numbers: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    """Number format; the integers are rounded at random so that their mean is right (QSGD)."""


class WireConfig(Section):
    """How much travels."""

    up: CodecConfig = CodecConfig()
    """Updates of the sites."""
    down: CodecConfig = CodecConfig()
    """What changed in the adapter since the sites last had it."""
    error_feedback: bool = True
    """A site keeps what its codec left out and adds it to its next update."""


class FederationConfig(Section):
    """Who is asked, who must answer, how long the server waits and what it does about faults."""

    weighting: Literal["examples", "uniform"] | dict[str, Annotated[float, Field(gt=0)]] = (
        "examples"
    )
    """Sites count by their number of training cases, all alike, or by a constant for each site."""
    min_sites: int | None = Field(default=None, ge=1)
    """Usable replies a round needs; more than half of the sites asked when left out."""
    sites_per_round: int | None = Field(default=None, ge=1)
    """Ask only so many sites in a round, drawn anew each time; all of them when left out."""
    wait_s: float = Field(default=300, gt=0)
    """How long the server waits for enough sites to be online."""
    round_timeout_s: float = Field(default=3600, gt=0)
    """A site that trains longer than this in one round gives up and says so."""
    retries: int = Field(default=2, ge=0)
    """How often a round without enough usable replies asks the missing sites again."""
    retry_wait_s: float = Field(default=5, ge=0)
    """Wait before the first of these attempts; doubled for each further one."""
    quarantine_rounds: int = Field(default=2, ge=0)
    """Rounds a site sits out after a reply that was refused, while there are enough others."""
    clip_norm: Literal["median"] | Annotated[float, Field(gt=0)] | None = None
    """Longer updates are shortened to this norm, or to the median norm of the round's updates."""
    byzantine_sites: int = Field(default=1, ge=1)
    """Wrong sites that a robust strategy is to withstand: `median` and `trimmed-mean` need twice as
    many usable replies and one, `krum` and `multi-krum` twice as many and three."""
    secure_aggregation: bool = False
    """The server sees the sum of a round's updates and no update; for `fedavg` and `ffa` with equal
    weights and a number as `clip_norm`, which the sites then apply."""


class ServerOptimiserConfig(Section):
    """What the server does with the combined update (arXiv 2003.00295); `none` adds it."""

    name: Literal["none", "momentum", "adam", "yogi"] = "none"
    learning_rate: float | None = Field(default=None, gt=0)
    """Of the server, on the combined update; 1 when left out, or 0.01 for `adam` and `yogi`, which
    move each number by about so much in a round."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the former step that is kept; beta 1 of `adam` and `yogi`."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Memory of squared updates, for `adam` and `yogi`."""
    tau: float = Field(default=1e-3, gt=0)
    """Added to the root of squared updates, for `adam` and `yogi`."""


class PersonalConfig(Section):
    """What each site keeps for itself."""

    parts: tuple[Literal["encoder", "decoder", "lora_A", "lora_B"], ...] = ()
    """Trained tensors that never leave the site and go on from round to round."""
    fine_tune_steps: int = Field(default=0, ge=0)
    """Steps each site trains the final adapter further for itself."""


class SelectionConfig(Section):
    """Which round's adapter is kept, by the mean Dice on validation cases."""

    keep: Literal["last", "best"] = "last"
    """`best` chooses by the cases that are also scored at the end, and the report says so."""
    patience: int | None = Field(default=None, ge=1)
    """Stop when so many scored rounds in a row bring no better Dice."""
    rollback_drop: float | None = Field(default=None, gt=0, le=1)
    """Go back to the best round's adapter when Dice falls this far below it."""


class EvaluationConfig(Section):
    """How adapters are scored on validation cases."""

    every_rounds: int = Field(default=1, ge=1)
    """Validation Dice after every n-th round; the last round is always scored."""
    nsd_tolerance_mm: float = Field(default=1.0, gt=0)
    flip: tuple[Literal["left-right", "anterior-posterior", "superior-inferior"], ...] = ()
    """Mirrored copies averaged at test time."""
    window_overlap: float = Field(default=0.25, ge=0, lt=1)
    """Overlap of sliding windows where a plane is larger than the model input."""
    prompts: Literal["none", "box", "point"] = "none"
    """Oracle prompts, taken from the true labels: scores say what a perfect reader's box or points
    would give, and are marked so. `samaritan predict` has no labels and refuses them."""


class PrivacyConfig(Section):
    """Differential privacy: whose part in the training a released adapter hides, and how well."""

    unit: Literal["none", "patient", "slice", "site"] = "none"
    """Patient: all slices and visits together, noise at the site. Slice: each slice by itself,
    noise at the site; says little about patients. Site: a site's whole update, noise at the server,
    which then must be trusted. None: nothing is hidden."""
    epsilon: float | None = Field(default=None, gt=0)
    """Budget of each cohort, whichever runs spend it."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """1 / (10 records), at most 1e-5, when left out."""
    records: dict[str, Annotated[int, Field(ge=1)]] | Annotated[int, Field(ge=1)] | None = None
    """Training patients (or slices) as published, for each site or for all alike: a rounded number.
    The true one is never used. For `site` it is the number of sites that train."""
    sampling_rate: float = Field(default=0.1, gt=0, le=1)
    """Chance of each record to take part in a step."""
    steps_per_round: int = Field(default=20, ge=1)
    """Noisy steps of each site in a round; takes the place of `training.slices_per_case`."""
    slices_per_patient: int = Field(default=8, ge=1)
    """Slices drawn of a patient in each step it takes part in."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient (for `site`, update) of one record."""
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    """Moves `clip_norm` until this share of records is not clipped (arXiv 1905.03871); the share is
    counted with noise of its own, and both together cost what the noise multiplier says."""
    noise_multiplier: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise over the clipping norm; fitted to `epsilon` over all rounds
    when left out. Given with `epsilon`, a site leaves when its next round would exceed it."""
    scores: Literal["withheld", "declared"] = "withheld"
    """Whether sites tell the server their validation scores. Declared: they do, without noise, and
    the report says so; the guarantee covers training patients only."""


class Config(Section):
    """Everything that decides the result of a run."""

    name: str = Field(default="samaritan", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    rounds: int = Field(default=10, ge=1)
    strategy: str = "fedavg"
    model: ModelConfig = ModelConfig()
    peft: PeftConfig = PeftConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    wire: WireConfig = WireConfig()
    server_optimiser: ServerOptimiserConfig = ServerOptimiserConfig()
    personal: PersonalConfig = PersonalConfig()
    selection: SelectionConfig = SelectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _reachable_quorum(self) -> Config:
        wanted = self.federation.min_sites
        known = self.data.source == "phantoms" or self.data.partition == "uniform"
        if wanted is not None and known and wanted > self.data.sites:
            raise ValueError(
                f"federation.min_sites is {wanted} but data.sites is {self.data.sites}"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides.

    Args:
        path: The YAML file.
        overrides: Items such as ``peft.rank=4``; values are read as YAML.

    Raises:
        ConfigError: With every fault of the file and the overrides in one message.
    """
    tree = read_tree(path, overrides)
    if "variants" in tree:
        raise ConfigError(
            "SAM-C307", f"{path} holds several variants of one run",
            f"Run them with `samaritan compare {path}`.",
        )  # fmt: skip
    return parse_config(tree, str(path))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file after its overrides, their keys and types unchecked.

    Raises:
        ConfigError: When the file or an override cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "SAM-C101", f"cannot read the configuration {path}: {_reason(error)}", "Check the path."
        ) from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(
            "SAM-C102", f"{path} is not valid YAML: {error}", "Mend the line named above."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError("SAM-C102", f"{path} holds no mapping of keys to values", "See configs/.")
    for item in overrides:
        _override(tree, item)
    return tree


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Checks a tree of plain values; all faults come in one ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "SAM-C103",
            f"{source} has {describe_faults(error, Config)}",
            "Mend each key; every key and its default is in docs/configuration.md.",
        ) from error


def describe_faults(error: ValidationError, model: type[Section]) -> str:
    """The number of faults and, in a line for each key, what is wrong with it.

    Args:
        error: From reading a tree of plain values.
        model: What it was read as; unknown keys are compared with its keys.
    """
    found: dict[str, list[str]] = {}
    for detail in error.errors():
        key = ".".join(str(p) for p in detail["loc"] if not _BRANCH.match(str(p)))
        found.setdefault(key, []).append(_fault(key, detail, model))
    faults = [f"{key}: {' / '.join(texts)}".removeprefix(": ") for key, texts in found.items()]
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    return f"{count}:\n" + "\n".join(f"  - {fault}" for fault in faults)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_sha256(config: Config) -> str:
    """Hash of the resolved configuration, independent of key order and layout."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def config_differences(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ, with both values."""
    before, after = (dict(_leaves(c.model_dump(mode="json"))) for c in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key the configuration knows."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            keys += config_keys(section, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _section(kind: Any) -> type[Section] | None:
    """The section that a key holds, be it one or a list of them."""
    kinds = (kind, *get_args(kind))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, raw = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            "SAM-C104", f"--set {item!r} is not of the form key=value", "Example: --set rounds=3"
        )
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(
            "SAM-C104", f"--set {item!r} has an unreadable value", "Quote it as YAML."
        ) from error
    if not set_key(tree, key.strip(), value):
        raise ConfigError(
            "SAM-C104", f"--set {item!r} goes through a value that is no section", "Check the key."
        )


def set_key(tree: dict[str, Any], key: str, value: Any) -> bool:
    """Sets a dotted key; False where the way to it leads through a value that is no section."""
    *parents, leaf = key.split(".")
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, {}) if isinstance(node, dict) else None
        if node is None:
            break
    if not isinstance(node, dict):
        return False
    node[leaf] = value
    return True


def _fault(key: str, detail: ErrorDetails, model: type[Section]) -> str:
    if detail["type"] == "extra_forbidden":
        near = _nearest(key, model)
        return "unknown key" + (f"; did you mean {near}?" if near else "")
    if detail["type"] == "missing":
        return "is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" and not key:
        return message
    got = repr(detail["input"])
    return f"{message} (got {got if len(got) <= _LONGEST_VALUE else got[:_LONGEST_VALUE] + '...'})"


def _nearest(key: str, model: type[Section]) -> str | None:
    keys = config_keys(model)
    sections = {key.rpartition(".")[0] for key in keys if "." in key}
    known = keys + sorted(sections)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    # `rank: 4` at the top level means `peft.rank`: compare the last names alone.
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.7)
    return by_leaf[leaf[0]] if leaf else None


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
