"""Writes docs/methods.md from samaritan/models/presets.py.

Run it after every change of the presets: ``.venv/bin/python docs/make_methods.py``.
"""

from __future__ import annotations

from pathlib import Path

from samaritan.models.count import count_trained
from samaritan.models.presets import PRESETS, Insert, Preset

PAGE = Path(__file__).with_name("methods.md")

_BASES = ("vit_b", "vit_l", "vit_h")
_RANK, _CLASSES, _SIDE, _DEPTH = 32, 2, 1024, 5

_HEAD = """# Ways of adapting SAM

Written by `docs/make_methods.py` from `samaritan/models/presets.py`; choose one with `peft.preset`.

A preset is a list of parts: layers that get a LoRA (B starts at zero; on the fused qkv it acts on
q and v alone), parts trained in full, and small modules that are added. Nothing else is trained,
and nothing else leaves a site. (The miniature `tiny` was never trained, and with a LoRA preset also
trains patch embedding, neck, norms, biases and position tables.) *Heads* are the mask tokens, the
upscaling and the hypernetworks of the mask decoder. A method that leaves them frozen keeps SAM's
own three, and with the reference decoder random ones.

| Preset | Source | LoRA | Trained in full | Added |
|---|---|---|---|---|
"""

_COUNTS = f"""
## Parameters, and bytes of one transfer

Trained parameters at rank {_RANK}, {_CLASSES} structures, {_SIDE} pixels, {_DEPTH} slices per
record where a method works across slices, SAM's own decoder; in brackets MiB in fp32, which is what
one site sends in one direction of one round. The counts hold no image and need no checkpoint.

| Preset | {" | ".join(_BASES)} |
|---|{"---|" * len(_BASES)}
"""

_TAIL = """
`samaritan models count --base vit_b --preset flap-sam --rank 32 --classes 2 --image-size 224
--decoder reference` counts other settings. With the reference decoder at 224 pixels the counts
of `full`, `attention-only`, `decoder-only`, `partial-decoder`, `lora-only`, `lora-decoder` and
`flap-sam` are 90,532,927, 30,053,104, 3,902,195, 478,320, 1,368,064, 5,270,259 and 1,846,384: the
last five are 23.2, 189, 66, 17.2 and 49 times less than `full`, where the FLAP-SAM paper prints
23.2, 187.4, 66.1, 17.2 and 48.9 from rounded figures. For `attention-only` it prints 2.8, if we
read its label rightly, and ours is 3.0. `tests/test_presets.py` holds the counts.

## Choices beside the preset

- `peft.rank`, and `peft.ranks` for other ranks by group of layers, such as `{decoder: 4}`.
- `peft.variant`: `lora`, `rslora` (scale alpha / sqrt(rank), arXiv 2312.03732) or `dora` (rows keep
  lengths of their own, arXiv 2402.09353).
- `peft.blocks`: adapt only the last encoder blocks. What lies before them is frozen, so that
  `training.prefix_cache_mb` can keep its activations.
- `model.decoder`: `official`, whose logits come at a quarter of the input, or `reference`,
  FLAP-SAM's with four upscaling stages, whose logits come at full size. The layers that the
  reference decoder has besides start from fixed random numbers, since no checkpoint holds them.
- `training.prompts`: none, boxes, points or a mixture, taken from the labels.

## Where we differ from the sources

- Every added module starts without effect (its last projection is zero), except the tokens of
  `prompt-tuning`. The bottlenecks of Med-SA and the adapters
  across slices of MA-SAM start at random in their code.
- `cheap-lunch`: we know the paper's abstract, not its code, and put LoRA on q and v of the encoder
  and on all four projections of the decoder's attention.
- `med-sa` follows the published code in the encoder. The decoder's three adapters are described in
  the paper and absent from its code; ours are plain bottlenecks at these places, without the
  conditioning on prompts. Heads are trained, not the whole decoder.
- `ma-sam` sees the slices of a record (`data.context_slices`) as images and predicts the middle
  one; the published code predicts all of them. It leaves out the dropout of 0.1 in the factors.
- `norm-bias`: micro-sam offers norms and biases as two methods of the encoder and trains the whole
  decoder beside them; here both are one, in encoder and decoder, and heads are trained.
- `prompt-tuning` has not been described for SAM: its tokens have no place on the grid, are looked
  at by every window, and are new in each block, as in VPT-deep.
- The position tables keep their official shape while they are frozen, and are resized on the fly;
  a method that trains them resizes them first.
- Some published methods train tensors that have no part in a promptless mask: the quality head
  and the embeddings of prompts. They are counted and sent, and do not change without prompts.

## Merging

`merged_state` in `samaritan/models/adapter.py` folds any method but `med-sa`, `ma-sam` and
`prompt-tuning` into a state dict under official names. The stock classes load it where its shapes
are theirs: with SAM's own decoder, as many mask tokens, and position tables that were not trained
at another size. Frozen weights held in bf16 come out rounded to bf16.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    methods = "".join(_row(name, preset) for name, preset in PRESETS.items())
    return _HEAD + methods + _COUNTS + "".join(_counts(name) for name in PRESETS) + _TAIL


def _row(name: str, preset: Preset) -> str:
    train = ", ".join(f"`{part}`" for part in preset.train)
    heads = "`decoder.tokens`, `decoder.upscaling`, `decoder.hypernetworks`"
    lora = ", ".join(f"`{part}`" for part in preset.lora)
    added = "; ".join(_insert(insert) for insert in preset.inserts)
    return f"| `{name}` | {preset.source} | {lora} | {train.replace(heads, 'heads')} | {added} |\n"


def _insert(insert: Insert) -> str:
    match insert.kind:
        case "tokens":
            what = f"{insert.size:.0f} tokens"
        case "factors":
            what = "shared factors of q and v, of the rank"
        case "before_attention" | "after_attention":
            what = f"convolution across slices {insert.kind.replace('_', ' ')}, {insert.size} wide"
        case "depth":
            what = "attention along slices, then a bottleneck"
        case _:
            what = f"bottleneck, {insert.kind}"
    return f"{what} (`{insert.part}`)"


def _counts(name: str) -> str:
    cells = []
    for base in _BASES:
        trained = count_trained(base, name, _RANK, _CLASSES, _SIDE, depth=_DEPTH).trained
        cells.append(f"{trained:,} ({trained * 4 / 2**20:.1f})")
    return f"| `{name}` | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
