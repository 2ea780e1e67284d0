"""Writes docs/configuration.md from samaritan/config.py.

Run it after every change of the configuration: ``.venv/bin/python docs/make_configuration.py``.
Types, defaults and limits come from the pydantic fields, meanings from the line under each field.
"""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from samaritan import config

PAGE = Path(__file__).with_name("configuration.md")

_MEANINGS = {
    "name": "Names the run and, where `--out` is left out, its folder.",
    "seed": "Decides splits, pseudo-sites, phantoms, the start of the adapter, and every draw in "
    "training.",
    "rounds": "Rounds of the whole run.",
    "strategy": "How updates are combined; a name from `strategies/rules.py`.",
    "peft.preset": "Which parts of SAM are trained; a name from `samaritan models list`.",
    "peft.rank": "LoRA rank.",
    "data.source": "`folder` reads `--data DIR`; `phantoms` makes volumes in the run folder "
    "unless `--data` is given.",
    "data.slice_axis": "The plane of the slices; `auto` cuts across the axis with clearly the "
    "thickest voxels, else axial.",
    "data.note": "One sentence on the data, shown in the report.",
    "training.batch_size": "Slices per optimiser step.",
    "training.learning_rate": "Peak learning rate of AdamW.",
    "training.weight_decay": "Weight decay of AdamW.",
    "training.clip_norm": "Gradients are scaled down to this norm.",
    "training.rotate_degrees": "Slices are rotated by up to this angle, either way.",
    "training.scale_fraction": "Slices are enlarged or reduced by up to this share.",
    "training.shift_fraction": "Slices are shifted by up to this share of their side.",
    "training.intensity_fraction": "Strength of random gamma, contrast, brightness and noise.",
    "training.precision": "Number format of the image encoder; `auto` takes bf16 where the "
    "processor or GPU has units for it.",
    "server_optimiser.name": "`momentum` is FedAvgM, `adam` FedAdam, `yogi` FedYogi.",
    "evaluation.nsd_tolerance_mm": "Distance at which two surfaces still count as equal.",
}
"""Keys whose field has no line under it in the source."""

_INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py from samaritan/config.py; do not edit by hand. -->

A run is described by one YAML file; [configs/demo.yaml](../configs/demo.yaml) is an example.
Every key has a default, so a file holds only what differs. `--set` overrides a key on the command
line, with its value written as YAML:

```sh
samaritan simulate configs/demo.yaml --set rounds=3 --set peft.rank=4
```

An unknown key or a value out of range is refused, and all faults are reported together. The
resolved file, with every default written out, is saved as `config.yaml` in the run folder. Its
SHA-256 is in `summary.json`; every site compares it with its own before it trains.

In the tables, "none" as a default means that the key may be left out; the meaning says what
happens then.
"""

_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def page() -> str:
    """The whole page.

    Raises:
        ValueError: When a key has no meaning, two, or one that belongs to no key.
    """
    tables = _tables(config.Config, "")
    unknown = _MEANINGS.keys() - set(config.config_keys())
    if unknown:
        raise ValueError(f"_MEANINGS explains keys that do not exist: {sorted(unknown)}")
    return _INTRODUCTION + "".join(tables)


def _tables(model: type[BaseModel], prefix: str) -> list[str]:
    """One table for a section and one for each section inside it."""
    lines = _attribute_lines(model)
    rows, inner = [], []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, config.Section):
            inner += _tables(kind, f"{prefix}{name}.")
        else:
            rows.append(_row(prefix + name, field, lines.get(name)))
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    head = f"\n## {title}\n\n{inspect.getdoc(model)}\n\n"
    head += "| Key | Type | Default | Meaning |\n| --- | --- | --- | --- |\n"
    return [head + "".join(rows), *inner]


def _row(key: str, field: FieldInfo, line: str | None) -> str:
    if (line is None) == (key not in _MEANINGS):
        raise ValueError(f"{key}: explain it either in samaritan/config.py or in _MEANINGS")
    cells = (f"`{key}`", _type(field), _default(field.get_default()), line or _MEANINGS[key])
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _attribute_lines(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field of a class, by field."""
    (body,) = ast.parse(inspect.getsource(model)).body
    if not isinstance(body, ast.ClassDef):
        raise TypeError(f"{model} is no class")
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = " ".join(below.value.value.split())
    return found


def _type(field: FieldInfo) -> str:
    return ", ".join([_kind(field.annotation), *_limits(field)])


def _limits(field: FieldInfo) -> list[str]:
    """What pydantic checks beyond the type, in words."""
    limits = [
        text.format(getattr(rule, name))
        for rule in field.metadata
        for name, text in _LIMITS.items()
        if getattr(rule, name, None) is not None
    ]
    patterns = [getattr(rule, "pattern", None) for rule in field.metadata]
    return limits + [f"matches `{pattern}`" for pattern in patterns if pattern is not None]


def _kind(annotation: Any) -> str:
    """A type in words."""
    words = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
    if annotation in words:
        return words[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [limit for rule in arguments[1:] for limit in _limits(rule)]
        return ", ".join([_kind(arguments[0]), *limits])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return "; or ".join(_kind(a) for a in arguments if a is not type(None))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_kind(arguments[0])}"
    if origin is tuple and len(set(arguments)) == 1:
        return f"list of {len(arguments)}, each {_kind(arguments[0])}"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    raise ValueError(f"no words for the type {annotation}")


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value == ():
        return "`[]`"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
