"""`samaritan predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samaritan.cli.console import Progress

_SUFFIXES = (".nii", ".nii.gz")


def predict(
    adapter: Annotated[Path, typer.Option(help="Adapter folder of a run.")],
    source: Annotated[Path, typer.Option("--input", help="NIfTI image, or a folder of them.")],
    target: Annotated[Path, typer.Option("--output", help="Label map, or a folder for them.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The base's checkpoint, if it moved since training.")
    ] = None,
) -> None:
    """Segment images; each label map has its input's grid and affine."""
    from samaritan.data.datasets import Case
    from samaritan.data.slices import CaseCache
    from samaritan.data.volume import write_label_map
    from samaritan.models.adapter import image_size, load_adapted, read_adapter
    from samaritan.training.evaluate import predict_indices, to_label_values

    pairs = _pairs(source, target)
    saved = read_adapter(adapter)
    _refuse_oracle(saved.config.evaluation.prompts, adapter)
    model = load_adapted(saved, checkpoint)
    cache = CaseCache(saved.config.data, saved.classes, image_size(saved.config))
    progress = Progress()
    try:
        for image, label in pairs:
            progress.update(image.name)
            prepared = cache.get(Case(_stem(image), image, None, "", "", ""))
            settings = saved.config.evaluation
            indices = predict_indices(model.segmenter, prepared, cache, settings)
            label.parent.mkdir(parents=True, exist_ok=True)
            write_label_map(label, to_label_values(indices, saved.classes), prepared.native)
    finally:
        progress.stop()
    legend = ", ".join(f"{value} {name}" for name, value in saved.classes.items())
    typer.echo(f"{len(pairs)} label map{'s' if len(pairs) > 1 else ''} in {target} ({legend})")


def _refuse_oracle(prompts: str, adapter: Path) -> None:
    """Images to predict have no label that prompts could be taken from.

    Raises:
        ConfigError: When the adapter asks for such prompts.
    """
    from samaritan.errors import ConfigError

    if prompts != "none":
        raise ConfigError(
            "SAM-C211",
            f"evaluation.prompts is {prompts}: prompts from true labels, which these images lack",
            f"Set evaluation.prompts to none in {adapter / 'samaritan.json'}, and score it so too.",
        )


def _pairs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Input and output files, checked before anything is loaded.

    Raises:
        DataError: When there is no input, or an output would overwrite its input.
    """
    from samaritan.errors import DataError

    if source.is_dir():
        images = sorted(p for p in source.iterdir() if _is_image(p))
        if not images:
            raise DataError("SAM-D401", f"{source} holds no .nii or .nii.gz file", "Check --input.")
        pairs = [(image, target / f"{_stem(image)}.nii.gz") for image in images]
    else:
        if not source.is_file():
            raise DataError("SAM-D402", f"there is no image {source}", "Check --input.")
        inside = target.is_dir() or not _is_image(target)
        pairs = [(source, target / f"{_stem(source)}.nii.gz" if inside else target)]
    for image, label in pairs:
        if label.exists() and label.samefile(image):
            raise DataError(
                "SAM-D403", f"{label} would overwrite its own input", "Choose another --output."
            )
    return pairs


def _is_image(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith(".")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
