"""Read a run folder for the report: the summary, and what lies beside it.

``summary.json`` must be there. ``config.yaml``, ``cases.json`` and ``overlays.json`` may be missing
or broken: a run of many hours still gets its report, which then says what it lacks.

Everything read here is untrusted text. Site and case names come from other institutions, so control
characters, lone surrogates and bidirectional overrides are replaced before anything else sees them,
numbers that are not finite become ``None``, and an overlay is taken only from inside the folder and
only if it is a PNG.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from samaritan.errors import StorageError
from samaritan.report import facts

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_REPLACEMENT = "\ufffd"
_BIDI_CONTROLS = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
_OVERLAY_ORDER = {"worst": 0, "median": 1, "best": 2}

Json = dict[str, Any]


@dataclass(frozen=True)
class Overlay:
    """One picture of a case with its label and prediction.

    Attributes:
        png: The file's bytes.
        title: Why this case is shown, such as ``Worst case``.
        case_id: The case, empty if unknown.
        site: The site it belongs to, empty if unknown.
        dice: Its mean Dice, if known.
    """

    png: bytes
    title: str
    case_id: str = ""
    site: str = ""
    dice: float | None = None


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds, cleaned.

    Attributes:
        name: The run's name.
        finished: When the summary was written.
        summary: ``summary.json``.
        config_text: ``config.yaml`` as written, or None.
        cases: One entry per validation case; empty if unknown.
        overlays: Pictures, worst first.
        problems: What could not be read, one sentence each.
    """

    name: str
    finished: datetime
    summary: Json
    config_text: str | None
    cases: tuple[Json, ...]
    overlays: tuple[Overlay, ...]
    problems: tuple[str, ...]


def read_run_folder(run_dir: Path) -> RunFolder:
    """Read everything the report shows.

    Raises:
        StorageError: If there is no usable ``summary.json``.
    """
    problems: list[str] = []
    path = run_dir / "summary.json"
    summary = _read_summary(path)
    return RunFolder(
        name=clean_text(str(summary.get("name") or run_dir.resolve().name)),
        finished=datetime.fromtimestamp(path.stat().st_mtime, tz=UTC),
        summary=summary,
        config_text=_read_config(run_dir / "config.yaml", problems),
        cases=_read_list(run_dir / "cases.json", problems),
        overlays=_read_overlays(run_dir, problems),
        problems=tuple(problems),
    )


def clean_text(text: str) -> str:
    """Replace characters that could break a page or turn its text around."""
    return "".join(_REPLACEMENT if _is_unsafe(character) else character for character in text)


def clean(value: Any) -> Any:
    """Clean all text in a JSON value; numbers that are not finite become None."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean_text(str(key)): clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [clean(entry) for entry in value]
    return value


def _is_unsafe(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in _BIDI_CONTROLS or unicodedata.category(character) in {"Cc", "Cs", "Cn"}


def _read_summary(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(
            "SAM-S301",
            f"{path.parent} holds no summary.json, so there is nothing to report",
            "Name the folder of a finished run.",
        ) from error
    except (OSError, ValueError) as error:
        raise StorageError(
            "SAM-S302",
            f"{path} cannot be read: {error}",
            "The run was probably interrupted; resume it with --resume.",
        ) from error
    if not isinstance(value, dict):
        raise StorageError(
            "SAM-S302",
            f"{path} holds a {type(value).__name__} where an object is expected",
            "The file is not a run summary; resume or repeat the run.",
        )
    cleaned: Json = clean(value)
    return cleaned


def _read_config(path: Path, problems: list[str]) -> str | None:
    try:
        return clean_text(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        problems.append("config.yaml could not be read; the settings are missing below.")
        return None


def _read_list(path: Path, problems: list[str]) -> tuple[Json, ...]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError):
        problems.append(f"{path.name} could not be read; what it describes is missing below.")
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        problems.append(f"{path.name} is not a list of objects; what it describes is missing.")
        return ()
    return tuple(clean(value))


def _read_overlays(run_dir: Path, problems: list[str]) -> tuple[Overlay, ...]:
    listed = _read_list(run_dir / "overlays.json", problems)
    entries = listed or tuple(
        {"file": f"overlays/{path.name}", "title": f"{path.stem.capitalize()} case"}
        for path in sorted((run_dir / "overlays").glob("*.png"), key=_overlay_rank)
    )
    found = (_read_overlay(run_dir, entry, problems) for entry in entries)
    return tuple(overlay for overlay in found if overlay is not None)


def _overlay_rank(path: Path) -> tuple[int, str]:
    return _OVERLAY_ORDER.get(path.stem, len(_OVERLAY_ORDER)), path.name


def _read_overlay(run_dir: Path, entry: Json, problems: list[str]) -> Overlay | None:
    file = str(entry.get("file", ""))
    try:
        path = (run_dir / file).resolve()
        png = path.read_bytes() if path.is_relative_to(run_dir.resolve()) else b""
    except (OSError, ValueError):
        png = b""
    if not png.startswith(PNG_SIGNATURE):
        problems.append(f"The overlay {file!r} is not a PNG inside the run folder; it is left out.")
        return None
    return Overlay(
        png=png,
        title=str(entry.get("title") or "Case"),
        case_id=str(entry.get("case_id") or ""),
        site=str(entry.get("site") or ""),
        dice=facts.number(entry, "dice"),
    )
