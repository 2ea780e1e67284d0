"""What the label values of a site mean, and which of the study's structures it labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from samaritan.config import DataConfig
from samaritan.errors import ConfigError


def label_map(data: DataConfig, site: str, classes: Mapping[str, int]) -> Mapping[str, int]:
    """Structure name -> label value in the files of a site.

    Args:
        data: Names the sites with a map of their own.
        site: Whose files.
        classes: The study's structures and label values, which every other site uses.
    """
    return data.site_classes.get(site, classes)


def labelled_classes(data: DataConfig, site: str, classes: Mapping[str, int]) -> frozenset[int]:
    """Indices (1 to the number of classes, in the order of `classes`) that a site labels.

    Args:
        data: Names the sites with a map of their own.
        site: Which site.
        classes: The study's structures.
    """
    named = label_map(data, site, classes)
    return frozenset(index for index, name in enumerate(classes, 1) if name in named)


def check_label_maps(data: DataConfig, training: Collection[str], others: Collection[str]) -> None:
    """Refuses maps that cannot be meant.

    Args:
        data: `classes` and `site_classes`.
        training: Sites that train.
        others: Sites that only score.

    Raises:
        ConfigError: SAM-C223 without `data.classes`, SAM-C224 with every fault of the maps.
    """
    if not data.site_classes:
        return
    if data.classes is None:
        raise ConfigError(
            "SAM-C223",
            "data.site_classes is given and data.classes is not",
            "Name all structures of the study in data.classes; its order decides the outputs.",
        )
    known = sorted({*training, *others})
    faults = [
        f"{site}: {fault}"
        for site, named in sorted(data.site_classes.items())
        for fault in _faults(site, named, data.classes, known)
    ]
    taught = {name for site in training for name in label_map(data, site, data.classes)}
    faults += [f"no site that trains labels {name}" for name in data.classes if name not in taught]
    if faults:
        raise ConfigError(
            "SAM-C224",
            f"data.site_classes: {'; '.join(faults)}",
            f"The sites are {known}, the structures {list(data.classes)}; each label value of a "
            "site, from 1 on, means one structure.",
        )


def _faults(
    site: str, named: Mapping[str, int], classes: Mapping[str, int], known: Collection[str]
) -> list[str]:
    faults = [] if site in known else ["there is no such site"]
    faults += [] if named else ["labels nothing"]
    faults += [f"{name} is not in data.classes" for name in named if name not in classes]
    values = list(named.values())
    if len(set(values)) < len(values):
        faults.append(f"one label value has two meanings ({dict(named)})")
    faults += [f"{name} has label value {value}" for name, value in named.items() if value < 1]
    return faults
