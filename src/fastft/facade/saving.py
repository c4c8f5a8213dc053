"""The saving methods of models that come from `FastLanguageModel`, each a thin call into fastft.export."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastft.errors import Problem, UsageError, argument_names, did_you_mean
from fastft.facade.names import sort_out

_MEMORY = "tensors are read, merged and written one at a time"
_PLACE = "files are written beside their place and renamed when they are whole"
_LLAMA_CPP = "GGUF files are written by fastft itself"
# Arguments without a meaning here -> why.
_SENT = "nothing is sent here; the methods whose names begin with push_to_hub take it"
IDLE = {
    "commit_description": "the commit has its message alone",
    "create_pr": "push to a branch of your own with revision=",
    "first_conversion": _LLAMA_CPP + " from the merged fp32 weights",
    "install_missing_dependencies": "nothing is installed",
    "is_main_process": "call it on one process",
    "low_disk_space_usage": _PLACE,
    "max_shard_size": "files hold 5 GB",
    "maximum_memory_usage": _MEMORY,
    "merge_is_disposable": "no merged copy is written on the way",
    "private": _SENT,
    "safe_serialization": "safetensors are always written",
    "save_function": _PLACE,
    "save_peft_format": "an adapter is always in PEFT's format",
    "state_dict": "the model's own weights are saved",
    "tags": "the card says fastft",
    "temporary_location": _PLACE,
    "token": _SENT,
    "use_temp_dir": _PLACE,
    "variant": "files have transformers' own names",
}
REFUSED = {
    "push_to_hub": "Save first, then call the method whose name begins with push_to_hub.",
    "datasets": "Write them into the README.md of the folder and push that with fastft.push.",
}
_MERGED = {"merged_16bit": None, "merged_4bit_forced": "nf4", "torchao_fp8": "fp8", "fp8": "fp8", "fp8_dynamic": "fp8"}
SAVE_METHODS = ("lora", "merged_16bit", "merged_4bit", *list(_MERGED)[1:])
_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "float32": "fp32", "fp32": "fp32"}


def save_pretrained_merged(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    dtype: Any = None,
    base: str = "dequantised",
    **options: Any,
) -> Any:
    """Write the trained model into a folder: `fastft.merge`, or `fastft.save_adapter` for "lora".

    * `save_method`: "lora" (the adapter alone), "merged_16bit", "merged_4bit_forced" (NF4) or "fp8". "merged_4bit" is
      refused, as merging into 4 bits rounds the merged weights again: take "merged_4bit_forced" to have that.
    * `dtype`: of "merged_16bit"; None is fp16 for an fp16 base and bf16 otherwise, "float32" writes 32 bits.
    * `base`: see `fastft.merge`.
    """
    _say("save_pretrained_merged", options, save_pretrained_merged)
    precision = _precision(model, save_method, dtype)
    from fastft.export.merge import merge, save_adapter

    if precision is None:
        return save_adapter(model, save_directory, tokenizer)
    return merge(model, save_directory, precision=precision, base=base, tokenizer=tokenizer)


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    dtype: Any = None,
    base: str = "dequantised",
    **options: Any,
) -> Any:
    """Write the trained model as `save_pretrained_merged` does, into a temporary folder, and `fastft.push` that."""
    _say("push_to_hub_merged", options, push_to_hub_merged)
    _precision(model, save_method, dtype)
    from fastft.export.hub import check_push, push

    check_push(repo_id, token)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained_merged(model, folder, tokenizer, save_method, dtype=dtype, base=base)
        where = {"revision": revision, "commit_message": commit_message, "base_model": base_model}
        return push(folder, repo_id, token=token, private=bool(private), **where)


def save_pretrained_gguf(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    *,
    save_method: str | None = None,
    imatrix_file: Any = None,
    base: str = "dequantised",
    **options: Any,
) -> Any:
    """Write GGUF files of the trained model with `fastft.export_gguf`, and a Modelfile beside them.

    * `quantization_method`: one or several of llama.cpp's names, or "not_quantized" (f16), "fast_quantized" (q8_0),
      "quantized" (q4_k_m); None is "fast_quantized".
    * `save_method="lora"` writes the adapter alone, for use beside the base's file (f32, f16 or bf16).
    * `imatrix_file`: the path of an importance matrix.
    """
    _say("save_pretrained_gguf", options, save_pretrained_gguf)
    quantization_method = "fast_quantized" if quantization_method is None else quantization_method
    if save_method == "lora":
        return _save_lora_gguf(model, Path(save_directory).expanduser(), quantization_method)
    if save_method not in (None, "merged_16bit"):
        expected = "None, or 'lora' for the adapter alone"
        raise UsageError(Problem("save_pretrained_gguf save_method", save_method, expected))
    from fastft.export.gguf.export import export_gguf

    importance = _importance(imatrix_file)
    report = export_gguf(model, tokenizer, save_directory, quants=quantization_method, base=base, importance=importance)
    _write_modelfiles(model, tokenizer, [file.path for file in report.files])
    return report


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    save_method: str | None = None,
    imatrix_file: Any = None,
    base: str = "dequantised",
    **options: Any,
) -> Any:
    """Write GGUF files as `save_pretrained_gguf` does, into a temporary folder, and `fastft.push` that."""
    _say("push_to_hub_gguf", options, push_to_hub_gguf)
    from fastft.export.hub import check_push, push

    check_push(repo_id, token)
    with TemporaryDirectory() as temporary:
        how = {"save_method": save_method, "imatrix_file": imatrix_file, "base": base}
        save_pretrained_gguf(model, temporary, tokenizer, quantization_method, **how)
        where = {"revision": revision, "commit_message": commit_message, "base_model": base_model}
        return push(temporary, repo_id, token=token, private=bool(private), **where)


def save_pretrained_torchao(
    model: Any, save_directory: str | Path, tokenizer: Any = None, torchao_config: Any = None, **options: Any
) -> Any:
    """Write the trained model in fp8 with `fastft.merge`: e4m3, a scale for each row, in compressed-tensors' layout.

    Other schemes (`torchao_config`) are refused.
    """
    _say("save_pretrained_torchao", options, save_pretrained_torchao)
    if torchao_config is not None:
        remedy = "Its own library applies it to a merged folder."
        raise UsageError(Problem("save_pretrained_torchao torchao_config", torchao_config, "None (fp8)", remedy))
    return save_pretrained_merged(model, save_directory, tokenizer, "fp8")


METHODS: tuple[Callable[..., Any], ...] = (
    save_pretrained_merged,
    push_to_hub_merged,
    save_pretrained_gguf,
    push_to_hub_gguf,
    save_pretrained_torchao,
)


def _say(owner: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Print a line for each idle argument; raise `UsageError` for those that are unknown or cannot be served."""
    rest = sort_out(owner, options, argument_names(function), (), IDLE, REFUSED)
    if rest.problems:
        raise UsageError(*rest.problems)
    for line in rest.lines:
        print(line)


def _precision(model: Any, save_method: str, dtype: Any) -> str | None:
    """Return the precision that a save_method means, None for the adapter alone."""
    name = str(save_method).lower().replace(" ", "_")
    if name == "lora":
        return None
    if name == "merged_4bit":
        remedy = "It rounds the merged weights to 4 bits again; 'merged_16bit' keeps them."
        raise UsageError(Problem("save_method", save_method, "'merged_4bit_forced' to merge into 4 bits", remedy))
    if name not in _MERGED:
        near = did_you_mean(name, SAVE_METHODS)
        raise UsageError(Problem("save_method", save_method, f"one of {', '.join(SAVE_METHODS)}", near))
    if dtype is not None and _DTYPES.get(str(dtype).removeprefix("torch.")) is None:
        raise UsageError(Problem("dtype", dtype, "None, 'bfloat16', 'float16' or 'float32'"))
    if _MERGED[name]:
        return _MERGED[name]
    from fastft.state import base_model

    held = dtype if dtype is not None else base_model(model).dtype
    chosen = _DTYPES[str(held).removeprefix("torch.")]
    return "bf16" if chosen == "fp32" and dtype is None else chosen


def _importance(path: Any) -> Any:
    """Return what an importance matrix's file says, None for none; True is refused: nothing is fetched unasked."""
    if path is None or path is False:
        return None
    if path is True:
        remedy = "Compute one (docs/how-to/export-gguf.md), or download one and give its path."
        raise UsageError(Problem("imatrix_file", path, "the path of an importance matrix", remedy))
    from fastft.export.gguf.imatrix import load_imatrix

    return load_imatrix(path).importance()


def _save_lora_gguf(model: Any, folder: Path, quant: str | Sequence[str]) -> Path:
    from fastft.export.gguf.lora import export_lora_gguf

    chosen = [quant] if isinstance(quant, str) else list(quant)
    if len(chosen) != 1:
        expected = "one of 'f32', 'f16' and 'bf16' with save_method='lora'"
        raise UsageError(Problem("quantization_method", quant, expected))
    # the default of the merged files means nothing for an adapter
    kind = "f16" if chosen[0] in ("fast_quantized", "not_quantized", "auto") else chosen[0]
    return export_lora_gguf(model, folder / "adapter.gguf", kind)


def _write_modelfiles(model: Any, tokenizer: Any, paths: Sequence[Path]) -> None:
    """Write a Modelfile for each file; without a known chat format there is none, and a line says why."""
    from fastft.export.modelfile import write_modelfile
    from fastft.state import get_state

    tokenizer = tokenizer if tokenizer is not None else get_state(model).tokenizer
    try:
        for path in paths:
            write_modelfile(path, tokenizer, name="Modelfile" if len(paths) == 1 else f"Modelfile.{path.stem}")
    except UsageError as error:
        print(f"fastft: save_pretrained_gguf: no Modelfile was written: {error}")
