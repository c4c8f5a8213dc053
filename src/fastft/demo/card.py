"""Put the trained model, its held-out text and a model card that states what was measured into the package."""

import json
import math
import shutil
from pathlib import Path

from fastft.demo import HELD_OUT_TEXT, MODEL_FOLDER

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
LIMIT = 10_000_000  # bytes

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [demo, tiny]
---

# fastft's demo model

A Llama of {parameters:,} parameters (hidden 256, 5 layers, 4 heads of 64 with 2 for keys and values, tied embeddings,
2,048 byte-level BPE tokens with single digits, context 512, ChatML turns), trained from scratch by
`scripts/make_demo_model` on one {device} in {seconds:.0f} s. It exists so that fastft can be tried, tested and shown
without any download. It writes recognisable English about Python, answers simple questions, and adds; it knows nothing
else and is often wrong.

## Measured

| what | value |
| --- | --- |
| perplexity per token on held-out library text (`held_out.txt`, windows of 512) | {text_perplexity:.2f} |
| perplexity per answer token on held-out generated conversations | {chat_perplexity:.3f} |
| held-out two-digit sums in the phrasings it was trained on ("What is 27 + 48?") | {plain_sums:.1%} |
| held-out two-digit sums told as a story ("Anna has 27 apples. Ben gives her 48 more ...") | {story_sums:.1%} |

Sums are 200 pairs of two-digit numbers that occur in no training conversation, in neither order and not as a
subtraction; answers are greedy and right when their last number is. All in bf16. Reading a sum out of a story is left
for the fine-tuning that `fastft demo` shows.

## Data

| part | tokens |
| --- | --- |
| docstrings, comments and help topics of Python's standard library and of the pip bundled with it | {text_tokens:,} |
| source code of the standard library, without its tests | {code_tokens:,} |
| {conversations:,} generated conversations (sums, words, small facts, documented functions, styles) | {chat_tokens:,} |

Seed {data_seed}. One source file in 25 is held out, and its paragraphs that occur elsewhere too are dropped. The
library's texts are under the licence of Python (PSF) and the bundled packages' own (MIT and similar); `held_out.txt`
quotes some.

## Training

{loop}: {tokens:,} tokens in {steps:,} steps of {rows} x 512, {text_share:.0%} of the rows text and
{code_share:.0%} code, loss on answers only in conversations. AdamW, peak rate {peak_lr:g}, {warmup} steps of
warm-up, cosine to {final_lr:.0%} of the peak, weight decay {weight_decay:g}, gradient norm clipped at {clip:g}; bf16
autocast over fp32 weights.

## What it writes

{samples}
"""


def install(work: Path, out: Path) -> str:
    """Copy model and held-out text into the package, write card and measurements, and return the card.

    Raises ValueError when the folder would be larger than 10 MB.
    """
    MODEL_FOLDER.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(out / name, MODEL_FOLDER / name)
    shutil.copyfile(work / "held_out.txt", HELD_OUT_TEXT)
    measured = json.loads((out / "training.json").read_text("utf-8"))
    data = json.loads((work / "data.json").read_text("utf-8"))
    text = render(measured, data, _parameters(MODEL_FOLDER / "model.safetensors"))
    (MODEL_FOLDER / "README.md").write_text(text, "utf-8")
    (MODEL_FOLDER / "training.json").write_text(json.dumps(measured | {"data": data}, indent=1) + "\n", "utf-8")
    size = sum(path.stat().st_size for path in MODEL_FOLDER.iterdir())
    if size > LIMIT:
        raise ValueError(f"{MODEL_FOLDER} holds {size:,} bytes, more than {LIMIT:,}")
    return text


def render(measured: dict, data: dict, parameters: int) -> str:
    """Write the card from `training.json` and `data.json`."""
    values = {**data, **measured, **measured["recipe"], "data_seed": data["seed"], "parameters": parameters}
    values["loop"] = "transformers alone" if measured["plain"] else "fastft's full fine-tuning (`fastft.compile`)"
    values["samples"] = "\n".join(
        f"* **{opening}** {' '.join(written.split())}" for opening, written in measured["samples"]
    )
    return _CARD.format(**values)


def _parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
