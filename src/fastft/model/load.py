"""Load a causal language model and its tokenizer, ready to be trained or asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from fastft.environment import local_rank
from fastft.errors import LoadError, Problem, UsageError, argument_names, unknown_arguments
from fastft.given import is_path, path_problem
from fastft.model import files
from fastft.model.adapters import DEFAULT_SEED, cuda_devices
from fastft.model.config import attention_problem, choose_dtype, device_problem, dtype_problem, widen_positions
from fastft.model.fp8_linear import quantize_linears
from fastft.model.quantize import (
    compute_in,
    config_for,
    keep_weights_unpacked,
    miscomputed,
    quant_of_checkpoint,
    quant_problem,
    settle_quant,
)
from fastft.model.tokenizer import load_tokenizer, settle_special_tokens
from fastft.model.tokens import extend_vocabulary, missing_tokens
from fastft.noise import between_libraries, quiet
from fastft.registry.spec import ModelSpec
from fastft.state import base_model, get_state, update_state

# Arguments of transformers' from_pretrained that load passes on.
PASSED_ON = (
    "cache_dir",
    "experts_implementation",
    "key_mapping",
    "max_memory",
    "offload_folder",
    "use_safetensors",
    "variant",
)
# What the same thing is called here, for names that people know from elsewhere.
_RENAMED = {
    "load_in_4bit": "quant='nf4'",
    "load_in_8bit": "quant='int8'",
    "quantization_config": "quant='nf4', 'int8' or 'fp8'",
    "torch_dtype": "dtype=",
    "device_map": "device=",
    "max_seq_length": "max_length=",
    "full_finetuning": "full=True",
    "use_auth_token": "token=",
    "model_name": "the first argument",
}


@frozen
class _Request:
    """The arguments of one call of `load`, checked."""

    source: str
    quant: str | None
    dtype: object
    max_length: int | None
    full: bool
    revision: str | None
    token: str | None
    trust_remote_code: bool
    device: str | int | torch.device | None
    attn_implementation: str | None
    options: Mapping[str, Any]

    def folder(self, source: str, revision: str | None) -> Path:
        return files.locate(source, revision, self.token, self.options.get("cache_dir"), self.trust_remote_code)


def load(
    path_or_id: str | Path,
    quant: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_length: int | None = None,
    full: bool = False,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    device: str | int | torch.device | None = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a local folder, the hub cache or the hub, in this order.

    * `quant`: None (16 or 32 bits), "nf4" (4 bits, double quantisation), "int8" or "fp8" (e4m3, a scale a row;
      the 16-bit weights pass through CPU memory).
    * `dtype`: of the unquantised weights and of computation; by default bf16 where the device has it, else fp16 (GPU)
      or fp32 (CPU).
    * `max_length`: tokens in a sequence; rope scaling is put in or widened if the model was made for fewer. None: the
      model's own.
    * `full`: every weight is trainable. Otherwise all are frozen until `add_lora`.
    * An adapter's folder loads its base model, then the adapter on it, trainable.
    * `options`: those of transformers' `from_pretrained` named in `PASSED_ON`.

    The model is in eval mode and the tokenizer pads on the left. What was put right on the way (pad token, EOS, rope
    scaling ...) is told by `describe(model)` and kept in `fastft.state.get_state(model).notes`.

    Raises `UsageError` for arguments that cannot work (all at once) and `LoadError` for files that cannot be loaded.
    """
    revised = _revision_problem(path_or_id, revision)
    _check_arguments(path_or_id, quant, dtype, max_length, full, device, attn_implementation, options, revised)
    request = _Request(
        str(path_or_id),
        quant,
        dtype,
        max_length,
        full,
        revision,
        token,
        trust_remote_code,
        device,
        attn_implementation,
        options,
    )
    folder = request.folder(request.source, revision)
    # building modules draws random numbers that the checkpoint then overwrites
    with torch.random.fork_rng(devices=[]), quiet():
        return _load_adapter(request, folder) if files.is_adapter(folder) else _load_model(request, folder)


def _check_arguments(
    source: object,
    quant: object,
    dtype: object,
    max_length: object,
    full: object,
    device: object,
    attention: object,
    options: Mapping[str, Any],
    *told: Problem | None,
) -> None:
    remedy = "Such as 'models/llama' or 'owner/name'."
    where = path_problem("load path_or_id", source, "the folder of a model, or its name on the hub", remedy)
    problems: list[Problem | str | None] = [where, *told, quant_problem(quant), dtype_problem(dtype)]
    problems += [device_problem(device), attention_problem(attention)]
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1):
        problems.append(Problem("max_length", max_length, "a positive number of tokens, or None"))
    if full and quant is not None:
        remedy = "Quantised weights cannot be trained: leave quant out, or leave full out and train an adapter."
        problems.append(Problem("full", full, f"False together with quant={quant!r}", remedy))
    names = [*argument_names(load), *PASSED_ON]
    problems += unknown_arguments("load", options, names, _RENAMED)
    found = [problem for problem in problems if problem is not None]
    if found:
        raise UsageError(*found)


def _revision_problem(path_or_id: str | Path, revision: str | None) -> Problem | None:
    """Return what is wrong with a revision of a folder here, which has none."""
    if revision is None or not is_path(path_or_id) or not Path(path_or_id).expanduser().is_dir():
        return None
    remedy = f"{str(path_or_id)!r} is a folder here, which is read as it stands; only models of the hub have revisions."
    return Problem("revision", revision, "None for a folder", remedy)


def _load_model(request: _Request, folder: Path) -> tuple[Any, Any]:
    files.check(folder)
    config = _read_config(request, folder)
    tokenizer = load_tokenizer(folder, request.trust_remote_code)  # quick, so that it fails before the weights are read
    model = _load_weights(request, folder, config)
    return model, _finish(request, model, tokenizer)


def _load_weights(request: _Request, folder: Path, config: Any) -> Any:
    """Load the weights, quantised if so asked, and record the state; the tokenizer comes later."""
    spec, notes = _find_spec(config)
    quant, more = settle_quant(
        request.quant,
        quant_of_checkpoint(_plain(getattr(config, "quantization_config", None))),
        request.full,
        request.source,
    )
    notes += more
    if quant == "int8":
        notes.append("int8: bitsandbytes rounds what goes into an 8-bit layer to fp16, whatever the dtype")
    max_length, more = widen_positions(config, request.max_length)
    notes += more
    device = _device(request.device)
    dtype = choose_dtype(request.dtype, device)
    arguments = dict(request.options)
    in_fp8 = request.quant == "fp8"
    if in_fp8 and request.device == "auto":
        raise UsageError(Problem("device", "auto", "one device with quant='fp8'", "Leave it out, or quant='nf4'."))
    if request.quant is not None and not in_fp8 and not getattr(config, "quantization_config", None):
        arguments["quantization_config"] = config_for(request.quant, dtype, spec)
    if request.attn_implementation is not None:
        arguments["attn_implementation"] = request.attn_implementation
    if not in_fp8:
        arguments["device_map"] = "auto" if request.device == "auto" else {"": str(device)}
    model = _from_pretrained(folder, config, dtype, request.trust_remote_code, arguments)
    compute_in(model, dtype)
    keep_weights_unpacked(model)
    notes += miscomputed(model)
    if in_fp8:
        quantize_linears(model, spec.keep_16bit if spec else (), device)
    # Adapters saved from this model name their base: the hub id rather than a folder of the hub's cache.
    local = Path(request.source).expanduser().is_dir()
    model.config._name_or_path = model.name_or_path = str(folder) if local else request.source
    _set_trainable(model, request.full)
    update_state(
        model,
        source=model.name_or_path,
        revision=request.revision,
        spec=spec,
        quant=quant,
        max_length=max_length,
        full=request.full,
        notes=tuple(notes),
    )
    return model


def _finish(request: _Request, model: Any, tokenizer: Any) -> Any:
    """Settle the special tokens and the tokenizer's length, and put both on record."""
    notes = settle_special_tokens(model, tokenizer)
    state = get_state(model)
    if state.max_length is not None:
        tokenizer.model_max_length = state.max_length
    _set_trainable(model, request.full)  # rows may have been added
    update_state(model, tokenizer=tokenizer, notes=(*state.notes, *notes))
    return tokenizer


def _plain(quantization: Any) -> dict[str, Any] | None:
    to_dict = getattr(quantization, "to_dict", None)
    return to_dict() if callable(to_dict) else quantization


def _set_trainable(model: Any, full: bool) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(full)


def _device(device: str | int | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device)


def _read_config(request: _Request, folder: Path) -> Any:
    from transformers import AutoConfig

    stored = files.read_json(folder / "config.json")
    kind = stored.get("model_type")
    if "auto_map" in stored and not request.trust_remote_code:
        from transformers import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            raise LoadError(
                f"{folder}: model type {kind!r} comes with Python code of its own, which is not run unasked; read it, "
                "and pass trust_remote_code=True if you trust it"
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=request.trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise LoadError(
            f"{folder / 'config.json'}: transformers cannot use it (model type {kind!r}): {error}; check the file, or "
            "install a version of transformers that knows this architecture"
        ) from error


def _find_spec(config: Any) -> tuple[ModelSpec | None, list[str]]:
    from fastft.registry.resolve import find

    spec = find(config)
    if spec is not None:
        return spec, []
    kind = getattr(config, "model_type", None)
    return None, [
        f"fastft has no spec for the architecture {kind!r}; it runs through transformers and PEFT unrewritten"
    ]


def _from_pretrained(
    folder: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool, arguments: dict[str, Any]
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        asked = arguments.get("attn_implementation")
        if asked is not None and isinstance(error, ImportError):  # of a package that it needs
            told = Problem("attn_implementation", asked, "None, or one that can be had here", str(error))
            raise UsageError(told) from error
        raise LoadError(f"{folder}: the weights cannot be loaded ({type(error).__name__}): {error}") from error
    absent = sorted(info.get("missing_keys") or ())
    wrong = sorted(str(entry) for entry in info.get("mismatched_keys") or ())
    problems = []
    if absent:
        problems.append(
            f"{folder}: {len(absent)} tensors of the model are not in the checkpoint, such as {absent[0]}; they would "
            "be random, so the checkpoint is incomplete or belongs to another architecture"
        )
    if wrong:
        problems.append(f"{folder}: {len(wrong)} tensors have another shape than config.json says, such as {wrong[0]}")
    if problems:
        raise LoadError(*problems)
    return model


def _load_adapter(request: _Request, folder: Path) -> tuple[Any, Any]:
    """Load an adapter's base, give it the adapter's tokens, and put the adapter on it, trainable."""
    from peft import PeftModel

    if request.full:
        raise UsageError(
            f"full=True: {request.source!r} is an adapter, whose base stays frozen; merge it first and load "
            "the merged model"
        )
    files.check(folder)
    stored = files.read_json(folder / files.ADAPTER_CONFIG)
    base_source = files.base_of(folder, stored)
    base_folder = request.folder(base_source, stored.get("revision"))
    files.check(base_folder)
    config = _read_config(request, base_folder)
    base_tokenizer = load_tokenizer(base_folder, request.trust_remote_code)
    tokenizer = load_tokenizer(folder, request.trust_remote_code) if files.has_tokenizer(folder) else base_tokenizer
    model = _load_weights(_for_base(request, base_source, stored.get("revision")), base_folder, config)
    new = missing_tokens(base_tokenizer, tokenizer)
    if new:
        extend_vocabulary(model, new)
    tokenizer = _finish(request, model, tokenizer)
    update_state(model, added_tokens=tuple(new))
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)), between_libraries():
            torch.manual_seed(DEFAULT_SEED)
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
            # read once more for what PEFT only warns about: weights that are not in the file
            missing = model.load_adapter(str(folder), "default", is_trainable=True).missing_keys
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise LoadError(f"{folder}: the adapter does not fit its base {base_source!r}: {error}") from error
    if missing:
        raise LoadError(
            f"{folder}: {len(missing)} tensors of the adapter are not in its file, such as {missing[0]}; they would be "
            "untrained, so the file is incomplete or belongs to another architecture"
        )
    model.eval()
    state = get_state(model)
    update_state(model, notes=(*state.notes, f"the adapter of {folder} was put on its base {base_source!r}"))
    return model, tokenizer


def _for_base(request: _Request, source: str, revision: str | None) -> _Request:
    from attrs import evolve

    return evolve(request, source=source, revision=revision)


def describe(model: Any) -> str:
    """Return what is loaded, for people: source, family, weights, trainable share, and what was put right."""
    state, base = get_state(model), base_model(model)
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    packed = sum(p.quant_state.shape.numel() for p in parameters if getattr(p, "quant_state", None) is not None)
    total = packed + sum(p.numel() for p in parameters if getattr(p, "quant_state", None) is None)
    family = state.spec.name if state.spec else f"{base.config.model_type} (no spec)"
    lines = [
        f"{state.source or base.name_or_path}: {family}, {total:,} parameters",
        f"  weights: {state.quant or str(base.dtype).removeprefix('torch.')}, on {base.device}",
        f"  trainable: {trainable:,} ({100 * trainable / max(total, 1):.2f}%)",
        f"  longest sequence: {state.max_length} tokens",
    ]
    return "\n".join(lines + [f"  note: {note}" for note in state.notes])
