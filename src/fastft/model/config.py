"""A model's config: the dtype to load it in, and its rotary positions widened to the length asked for."""

from collections.abc import Mapping
from typing import Any

import torch

from fastft.errors import Problem, UsageError, did_you_mean

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}


def dtype_problem(dtype: object) -> Problem | None:
    """Return what is wrong with a `dtype` argument, None if nothing is."""
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name in DTYPES:
        return None
    return Problem(
        "dtype", dtype, "None, 'bfloat16', 'float16' or 'float32' (or the torch dtype)", did_you_mean(name, DTYPES)
    )


def device_problem(device: Any, others: str = "'auto', ") -> Problem | None:
    """Return what is wrong with a `device` argument, None if nothing is. `others`: what it may be beside a device."""
    expected = f"None, {others}'cpu', 'cuda', 'cuda:0' ..."
    if device is None or (device == "auto" and others):
        return None
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        return Problem("device", device, expected)
    if place.type != "cuda":
        return None
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        remedy = "Leave it out, or see `fastft env` for what is missing: a driver, or a torch built for CUDA."
        return Problem("device", str(device), "'cpu' or None, as torch finds no CUDA device here", remedy)
    if (place.index or 0) >= there:
        return Problem("device", str(device), f"one of {', '.join(f'cuda:{index}' for index in range(there))}")
    return None


def attention_problem(attention: Any) -> Problem | None:
    """Return what is wrong with an `attn_implementation` argument, None if nothing is.

    Beside transformers' names that may be one with "paged|" before it, a kernel of the hub ("owner/name"), or a dict of
    these for the parts of a model.
    """
    if attention is None or isinstance(attention, Mapping):
        return None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from fastft.graph.attention import NAME

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    name = attention.removeprefix("paged|") if isinstance(attention, str) else ""
    if name in known or "/" in name:
        return None
    told = sorted(name for name in known if "|" not in name and name != NAME)  # which compiling puts in place
    return Problem(
        "attn_implementation", attention, f"None or one of {', '.join(told)}", did_you_mean(str(attention), told)
    )


def choose_dtype(dtype: object, device: torch.device) -> torch.dtype:
    """Return the torch dtype asked for; for None bfloat16 where the device computes in it, else fp16 (GPU) or fp32."""
    if dtype is not None:
        return DTYPES[str(dtype).removeprefix("torch.")]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # oneDNN has bf16 matrix products from AVX-512 on; without them bf16 is many times slower than fp32 on a CPU.
    fast = device.type != "cpu" or "512" in torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if fast else torch.float32


def widen_positions(config: Any, max_length: int | None) -> tuple[int | None, list[str]]:
    """Make `config` (changed in place) serve sequences of `max_length`; returns the length that now holds, and notes.

    By rope type, with s = max_length / max_position_embeddings: `default` becomes `linear` with factor s (positions
    divided by s, Chen et al. 2023, arXiv 2306.15595); `linear` and `llama3` multiply their factor by s; `yarn` takes
    at least factor max_length / original length (Peng et al. 2023, arXiv 2309.00071); `longrope` multiplies its long
    factors by s; `dynamic` grows by itself. Layers that look through a sliding window never see far positions and stay.
    Raises `UsageError` for a model whose positions are a learnt table.
    """
    text = config.get_text_config()
    native = getattr(text, "max_position_embeddings", None)
    if native is None or max_length is None or max_length <= native:
        return max_length or native, []
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        raise UsageError(
            Problem(
                "max_length", max_length, f"at most {native}", "This architecture has no rotary positions to stretch."
            )
        )
    scale = max_length / native
    if _only_sliding(text, native):
        text.max_position_embeddings = max_length
        return max_length, [f"every layer has a sliding window, so max_length={max_length} needs no rope scaling"]
    by_layer = getattr(text, "layer_types", None) and not set(rope).isdisjoint(text.layer_types)
    tables = {kind: table for kind, table in rope.items() if kind != "sliding_attention"} if by_layer else {"": rope}
    notes = []
    for kind, table in tables.items():
        if table is not None:
            what = _widen_table(table, scale, native, max_length)
            notes.append(f"rope{f' of {kind} layers' if kind else ''}: {what}")
    text.max_position_embeddings = max_length
    return max_length, [f"max_length={max_length} exceeds the model's {native}; {note}" for note in notes]


def _only_sliding(text: Any, native: int) -> bool:
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or not 0 < window < native or getattr(text, "use_sliding_window", True) is False:
        return False
    kinds = getattr(text, "layer_types", None)
    return kinds is None or set(kinds) == {"sliding_attention"}


def _widen_table(table: dict[str, Any], scale: float, native: int, max_length: int) -> str:
    kind = table.get("rope_type", "default")
    if kind == "default":
        table.update(rope_type="linear", factor=scale)
        return f"linear scaling with factor {scale:g} was put in"
    if kind in ("linear", "llama3", "proportional"):
        old = float(table.get("factor") or 1.0)
        table["factor"] = old * scale
        return f"the {kind} factor {old:g} became {old * scale:g}"
    if kind == "yarn":
        old, original = table["factor"], table.get("original_max_position_embeddings") or native
        table["factor"] = max(old, max_length / original)
        return f"the yarn factor {old:g} became {table['factor']:g}"
    if kind == "longrope":
        table["long_factor"] = [value * scale for value in table["long_factor"]]
        if table.get("factor"):
            table["factor"] = table["factor"] * scale
        return f"the longrope long factors were multiplied by {scale:g}"
    if kind == "dynamic":
        return "dynamic scaling grows with the sequence by itself and was left as it is"
    raise UsageError(
        Problem("max_length", max_length, f"at most {native}", f"Rope type {kind!r} cannot be stretched by fastft.")
    )
