"""`FastLanguageModel.from_pretrained`: arguments checked together, translated, and handed to `fastft.load`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastft.errors import Problem, UsageError, argument_names
from fastft.facade.inference import choose_fast_inference
from fastft.facade.methods import with_methods
from fastft.facade.names import IDLE_IN_LOADING, OF_ENGINE, REFUSED_IN_LOADING, plan_for, sort_out
from fastft.model import files
from fastft.model.config import dtype_problem
from fastft.model.load import PASSED_ON, load
from fastft.model.quantize import quant_of_checkpoint
from fastft.state import get_state, update_state

OWNER = "from_pretrained"


class _DefaultLength(int):
    """A number that can be told from the same number given by the caller."""


DEFAULT_LENGTH = _DefaultLength(2048)


def from_pretrained(
    model_name: str | Path,
    max_seq_length: int | None = DEFAULT_LENGTH,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
    token: str | None = None,
    device_map: Any = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_gradient_checkpointing: bool | str = "unsloth",
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    torch_dtype: torch.dtype | str | None = None,
    fast_inference: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer with `fastft.load`, from a local folder, the hub cache or the hub.

    * `max_seq_length`: tokens; more than the model was made for widens its rope scaling. Left out, it is 2048 or the
      model's own length, whichever is less; None is the model's own.
    * `load_in_4bit` (NF4, double quantisation) holds unless it is False or another of `load_in_8bit`, `load_in_16bit`
      and `full_finetuning` is asked for. `full_finetuning` makes every weight trainable, in 16 or 32 bits.
    * `dtype` (or `torch_dtype`): None takes bf16 where the device has it.
    * `use_gradient_checkpointing`: True and "unsloth" ask `fastft.compile` for the memory plan "min", False for "keep".
    * `device_map`: None or "sequential" (one device), "auto", a device, or {"": device}.
    * `fast_inference`: `model.fast_generate` and the trainer's rollouts sample with vLLM where it is installed, started
      when it is first wanted, in this process; `gpu_memory_utilization` (its part of the GPU; left out, it is worked
      out), `max_lora_rank` (64) and `float8_kv_cache` belong to it.
    * `options`: those that `fastft.load` passes on; what has no meaning here is accepted with one printed line each.

    Raises `UsageError` for what is unknown, not supported or contradictory, all at once, and `LoadError`.
    """
    lines: list[str] = []
    plan, wrong_plan = plan_for(OWNER, use_gradient_checkpointing)
    device, wrong_device = _device(device_map, lines)
    asked = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_16bit": load_in_16bit}
    quant, wrong_quant = _quant(asked, full_finetuning, quantization_config, lines)
    dtype, wrong_dtype = _dtype(dtype, torch_dtype)
    of_engine = {name: options.pop(name) for name in OF_ENGINE if fast_inference and name in options}
    known = argument_names(from_pretrained)
    rest = sort_out(OWNER, options, known, PASSED_ON, {**IDLE_IN_LOADING, **OF_ENGINE}, REFUSED_IN_LOADING)
    wrong = [*rest.problems, *wrong_quant, wrong_plan, wrong_device, wrong_dtype, _length_problem(max_seq_length)]
    problems = [problem for problem in wrong if problem is not None]
    if problems:
        raise UsageError(*problems)
    arguments = {
        "path_or_id": model_name,
        "quant": quant,
        "dtype": dtype,
        "max_length": None if max_seq_length is DEFAULT_LENGTH else max_seq_length,
        "full": bool(full_finetuning),
        "revision": revision,
        "token": token,
        "trust_remote_code": trust_remote_code,
        "device": device,
        "attn_implementation": attn_implementation,
        **rest.passed,
    }
    if quant and not any(asked.values()) and quantization_config is None:
        arguments["quant"] = _unless_stored_otherwise(arguments, lines)
    for line in (*lines, *rest.lines):
        print(line)
    model, tokenizer = load(**arguments)
    update_state(model, plan=plan or get_state(model).plan)
    if max_seq_length is DEFAULT_LENGTH:
        _cap_length(model, tokenizer)
    if fast_inference:
        choose_fast_inference(model, _engine_options(of_engine))
    return with_methods(model), tokenizer


def _engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the engine "vllm" that the familiar names mean."""
    options = {name: given[name] for name in ("gpu_memory_utilization", "max_lora_rank") if given.get(name)}
    if given.get("float8_kv_cache"):
        options["options"] = {"kv_cache_dtype": "fp8"}
    return options


def _cap_length(model: Any, tokenizer: Any) -> None:
    own = get_state(model).max_length
    if own is None or own > DEFAULT_LENGTH:
        tokenizer.model_max_length = int(DEFAULT_LENGTH)
        update_state(model, max_length=int(DEFAULT_LENGTH))


def _dtype(dtype: Any, torch_dtype: Any) -> tuple[Any, Problem | None]:
    """Return the dtype asked for under either name."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        both = Problem(f"{OWNER} dtype, torch_dtype", (dtype, torch_dtype), "one of the two: they are the same setting")
        return dtype, both
    dtype = torch_dtype if dtype is None else dtype
    return dtype, dtype_problem(dtype)


def _length_problem(length: Any) -> Problem | None:
    if length is None or (isinstance(length, int) and not isinstance(length, bool) and length >= 1):
        return None
    return Problem(f"{OWNER} max_seq_length", length, "a positive number of tokens, or None")


def _quant(
    asked: Mapping[str, bool | None], full: bool, given: Any, lines: list[str]
) -> tuple[str | None, list[Problem]]:
    """Return the one quantisation that the arguments ask for, and what contradicts it."""
    wanted = [name for name, value in asked.items() if value]
    stored, problems = _of_config(given)
    if given is not None:
        same = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}.get(stored or "")
        wanted = ["quantization_config", *(name for name in wanted if name != same)]
    if len(wanted) > 1:
        remedy = "A model is loaded in 4, 8 or 16 bits; 4 is the default."
        problems.append(Problem(f"{OWNER} {', '.join(wanted)}", "all of them", "one of them", remedy))
    narrow = [name for name in wanted if name != "load_in_16bit"]
    if full and narrow:
        remedy = "Quantised weights cannot be trained: leave one of the two out."
        problems.append(Problem(f"{OWNER} full_finetuning", True, f"False together with {narrow[0]}", remedy))
    if problems or full:
        if full and asked["load_in_4bit"] is None:
            lines.append(
                f"fastft: {OWNER}(full_finetuning=True) trains every weight, so load_in_4bit, otherwise the default, "
                "is off."
            )
        return None, problems
    if given is not None:
        return stored, []
    if asked["load_in_8bit"]:
        return "int8", []
    return (None if asked["load_in_16bit"] or asked["load_in_4bit"] is False else "nf4"), []


def _of_config(given: Any) -> tuple[str | None, list[Problem]]:
    """Return what a quantization_config (a BitsAndBytesConfig or a mapping) asks for."""
    if given is None:
        return None, []
    plain = given.to_dict() if callable(getattr(given, "to_dict", None)) else given
    stored = quant_of_checkpoint(plain) if isinstance(plain, Mapping) else type(given).__name__
    if stored in ("nf4", "int8"):
        return stored, []
    remedy = "Leave it out and pass load_in_4bit=True (NF4) or load_in_8bit=True."
    return None, [Problem(f"{OWNER} quantization_config", stored, "bitsandbytes NF4 or int8", remedy)]


def _unless_stored_otherwise(arguments: Mapping[str, Any], lines: list[str]) -> str | None:
    """Return the default "quant" of the arguments; or None for a checkpoint stored quantised otherwise, with a line."""
    name, quant = str(arguments["path_or_id"]), arguments["quant"]
    where = (arguments[key] for key in ("revision", "token"))
    folder = files.locate(name, *where, arguments.get("cache_dir"), arguments["trust_remote_code"])
    if files.is_adapter(folder) or not (folder / "config.json").is_file():
        return quant
    stored = quant_of_checkpoint(files.read_json(folder / "config.json").get("quantization_config"))
    if stored in (None, quant):
        return quant
    lines.append(f"fastft: {OWNER}: {name!r} is stored quantised ({stored}), which takes the place of load_in_4bit.")
    return None


def _device(device_map: Any, lines: list[str]) -> tuple[Any, Problem | None]:
    """Return the `device` of `fastft.load` that a device_map means, and what is wrong with it."""
    if device_map is None or device_map == "auto":
        return device_map, None
    if device_map == "balanced":
        return "auto", None
    if device_map in ("sequential", "unsloth"):
        lines.append(
            f"fastft: {OWNER}(device_map={device_map!r}): the model goes to one device; 'auto' spreads it over all."
        )
        return None, None
    if isinstance(device_map, Mapping):
        if len(device_map) == 1 and "" in device_map:
            return device_map[""], None
    elif isinstance(device_map, (int, torch.device)) or device_map in _device_names():
        return device_map, None
    remedy = "A map of single modules is not supported."
    expected = "None, 'sequential', 'auto', a device such as 'cuda:0', or {'': device}"
    return None, Problem(f"{OWNER} device_map", device_map, expected, remedy if isinstance(device_map, Mapping) else "")


def _device_names() -> set[str]:
    kinds = ("cpu", "cuda", "xpu", "mps")
    return {*kinds, *(f"{kind}:{index}" for kind in kinds for index in range(64))}
