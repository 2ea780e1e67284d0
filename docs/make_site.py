"""Writes docs/site.md from client/settings.py and samaritan/audit/policy.py.

Run it after every change of these: ``.venv/bin/python docs/make_site.py``. Types, defaults and
limits come from the pydantic fields, meanings from the line under each field, as
docs/make_configuration.py has them.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from client.settings import SiteSettings
from samaritan.audit.policy import SitePolicy

PAGE = Path(__file__).with_name("site.md")
_CONFIGURATION = runpy.run_path(str(Path(__file__).with_name("make_configuration.py")))

_INTRODUCTION = """\
# site.yaml

<!-- Written by docs/make_site.py from client/settings.py and samaritan/audit/policy.py; do not edit
by hand. -->

A hospital's own settings and rules. The file lies in the kit of the site and is read by the site
alone: no server and no plan can change it, and where they ask for more, the site refuses. A file
needs no more than this:

```yaml
data: /srv/cases
```

Relative paths start from the kit. An unknown key or a value out of range is refused (SAM-N103), and
all faults are reported together. The agent reads the file when it starts: after a change, stop the
site and start it. `samaritan doctor --kit KIT` says whether the file can be read, and whether its
rules allow the plans that were approved.
"""

_NOTES = """
## Hours

`policy.hours: ["Mon-Fri 19:00-06:00", "Sat 00:00-24:00"]` lets the site work at night on weekdays
and on Saturday, in the machine's local time; the days name when a window begins. Outside, it
answers with SAM-A202, and the server asks again later. Work that has begun goes on to its end.

## Who approves

Without `policy.approvers`, whoever may use `identity.key` approves plans. With it, each role
approves with a key of its own, and the agent checks all signatures at every question:

```console
$ samaritan site key officer.key
public key for site.yaml: 7c3186ba73ff166add0f66d51e6d11be50beae40f9788914701417331b679159
$ samaritan site approve plan.json --kit KIT --role officer --key officer.key
```

```yaml
policy:
  approvers:
    officer: 7c3186ba73ff166add0f66d51e6d11be50beae40f9788914701417331b679159
```

## Seeing what would leave

With `policy.dry_run: true` the site does all of its work and writes what would leave into its log,
and lets nothing out; the server sees an error code. `samaritan audit log show KIT/log/site.jsonl`
lists it.

## Two system users

`courier_user` names the user of the half that speaks with the network;
[hospital-it.md](hospital-it.md) shows how both are made. Whether that user can really not read the
data, `samaritan doctor` tells.
"""


def page() -> str:
    """The whole page."""
    tables = [_table("Settings", SiteSettings, ""), _table("`policy`", SitePolicy, "policy.")]
    return _INTRODUCTION + "".join(tables) + _NOTES


def keys() -> list[str]:
    """Every key, with dots."""
    own = [name for name in SiteSettings.model_fields if name != "policy"]
    return own + [f"policy.{name}" for name in SitePolicy.model_fields]


def _table(title: str, model: type[BaseModel], prefix: str) -> str:
    lines = _CONFIGURATION["_attribute_lines"](model)
    rows = []
    for name, field in model.model_fields.items():
        if name == "policy":
            continue
        if name not in lines:
            raise ValueError(f"{prefix}{name}: explain it in the line under its field")
        cells = (f"`{prefix}{name}`", _CONFIGURATION["_type"](field), _default(field), lines[name])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    doc = " ".join((model.__doc__ or "").split())
    head = (
        f"\n## {title}\n\n{doc}\n\n| Key | Type | Default | Meaning |\n| --- | --- | --- | --- |\n"
    )
    return head + "".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value: Any = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
