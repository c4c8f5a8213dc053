"""Run what was exported: a folder through transformers, a GGUF file through llama.cpp, or dequantised without it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn

from fastft.errors import LoadError
from fastft.export import llama_cpp
from fastft.export.encode import decode
from fastft.export.folder import find_weights, load_folder
from fastft.export.place import RECORD
from fastft.export.stored import stored_tensors
from fastft.model import files
from fastft.model.tokenizer import end_tokens, id_list, load_tokenizer
from fastft.state import base_model, get_state

if TYPE_CHECKING:
    from fastft.export.gguf.file import GgufFile

CONTEXT = 512  # tokens of the longest sequence that is asked


@frozen
class Engine:
    """An artefact made ready to be asked.

    `kind` is its precision or quant; `template` its chat template, None if it has none; `encode(text, special)` gives
    token ids, with BOS and the like if `special`, and is None where that needs llama.cpp; `logits(ids)` [tokens,
    vocabulary]. `problems` were found in its metadata, `notes` say what could not be looked at. `original`: its
    adapters were merged into the 16-bit checkpoint, where training saw a quantised one.
    """

    kind: str
    runner: str
    template: str | None
    encode: Callable[[str, bool], list[int]] | None
    logits: Callable[[Sequence[int]], Tensor]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    original: bool = False


@contextmanager
def engine(path: Path, model: Any, tokenizer: Any) -> Iterator[Engine]:
    """Open an artefact: a merged or adapter folder, or a GGUF file. Raises `LoadError` and `UsageError`."""
    if path.suffix == ".gguf":
        opened = _with_llama_cpp if llama_cpp.available() else _without_llama_cpp
        with opened(path, model, tokenizer) as made:
            yield made
    else:
        yield _of_folder(path, model, tokenizer)


def run_model(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the logits [tokens, vocabulary] of one sequence, in fp32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    return out.logits[0].float().cpu()


def token_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the token ids of a text, with BOS and the like if `special`; a text may be longer than the model takes."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _of_folder(path: Path, model: Any, trained_with: Any) -> Engine:
    found = find_weights(path)
    damage = files.weight_problems(found.folder)
    if damage:
        raise LoadError(*(f"{found.folder}: {problem}" for problem in damage))
    config = files.read_json(found.folder / "config.json") if not found.adapter else {}
    problems: list[str] = []
    method = (config.get("quantization_config") or {}).get("quant_method")
    if found.adapter:
        dtype = str(base_model(model).dtype).removeprefix("torch.")
        loaded, kind = load_folder(found, held=(get_state(model).quant, dtype)), "adapter"
        runner = "transformers and PEFT"
    elif method == "compressed-tensors":
        loaded, kind, runner = _dequantised(found), "fp8", "transformers, dequantised"
    else:
        loaded, kind = _plain(found, config, model, problems)
        runner = "transformers"
    loaded.eval()
    tokenizer = load_tokenizer(found.folder) if files.has_tokenizer(found.folder) else None
    notes = list(found.notes)
    if kind == "fp8":
        notes.append("an engine that runs fp8 also rounds the inputs of each layer to fp8; that is not done here")
    problems += [] if tokenizer is not None else ["no tokenizer lies beside the weights"]
    problems += [] if found.adapter else _end_differences(found.folder, loaded, model, trained_with)
    encode = None if tokenizer is None else partial(token_ids, tokenizer)
    kind = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(kind, kind)
    template = getattr(tokenizer, "chat_template", None)
    exported = files.read_json(found.folder / RECORD) if (found.folder / RECORD).is_file() else {}
    original = exported.get("base") == "original" and exported.get("quant") is not None
    return Engine(kind, runner, template, encode, partial(run_model, loaded), tuple(problems), tuple(notes), original)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens at which answers of the trained model end."""
    inner = base_model(model)
    return set(end_tokens(tokenizer, getattr(inner, "generation_config", None), inner.config))


def _end_differences(folder: Path, loaded: Any, model: Any, tokenizer: Any) -> list[str]:
    """Return where a folder's generation config ends an answer at other tokens than the model."""
    from transformers import GenerationConfig

    stored = (folder / "generation_config.json").is_file()
    theirs = GenerationConfig.from_pretrained(folder) if stored else getattr(loaded, "generation_config", None)
    there, here = sorted(id_list(getattr(theirs, "eos_token_id", None))), sorted(_ends(model, tokenizer))
    return [] if there == here else [f"generation stops at the tokens {there} there (eos_token_id) and at {here} here"]


def _plain(found: Any, config: dict[str, Any], model: Any, problems: list[str]) -> tuple[Any, str]:
    """Load a folder as transformers does: 16-bit weights in the reference's dtype if it is theirs, else in fp32.

    Tensors that it lacks, or that the model has no place for, are added to `problems`.
    """
    from transformers import AutoModelForCausalLM

    quantised = config.get("quantization_config") or {}
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    ours = str(base_model(model).dtype).removeprefix("torch.")
    dtype = "auto" if quantised or stored == ours else torch.float32
    device = model.get_input_embeddings().weight.device
    try:
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            found.folder,
            dtype=dtype,
            local_files_only=True,
            device_map={"": str(device)},
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise LoadError(f"{found.folder}: transformers cannot load it ({type(error).__name__}): {error}") from error
    for what, key in (("it lacks", "missing_keys"), ("the model has no place for", "unexpected_keys")):
        names = sorted(loading[key])
        if names:
            problems.append(f"{what} {len(names)} tensors: {', '.join(names[:5])}{' ...' * (len(names) > 5)}")
    kind = "nf4" if quantised.get("load_in_4bit") else "int8" if quantised.get("load_in_8bit") else stored
    return loaded, kind


def _dequantised(found: Any) -> Any:
    """Load an fp8 folder by multiplying its weights out."""
    tensors = stored_tensors(found.folder)

    def read(name: str) -> Tensor:
        parts = (key for key in (name, f"{name}_scale") if key in tensors)
        return decode(name, {key: tensors[key].read() for key in parts})

    return _filled(found, [name for name in tensors if not name.endswith("_scale")], read)


def _filled(found: Any, names: Sequence[str], read: Callable[[str], Tensor]) -> Any:
    """Return a model of the folder's architecture in fp32 with the given weights."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(found.skeleton()[0].config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return fill(AutoModelForCausalLM.from_config(config, dtype=torch.float32), names, read)


def fill(model: nn.Module, names: Sequence[str], read: Callable[[str], Tensor]) -> nn.Module:
    """Put weights under their checkpoint names into a model. Raises `LoadError` if one is left without."""
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        unknown = sorted(set(names) - set(parameters))
        missing = sorted(set(parameters) - set(names))
        if unknown or missing:
            raise LoadError(f"these weights do not fit the model: {', '.join((unknown + missing)[:5])}")
        for name in names:
            parameters[name].copy_(read(name))
    return model


@contextmanager
def _with_llama_cpp(path: Path, model: Any, tokenizer: Any) -> Iterator[Engine]:
    from fastft.export.gguf.file import read_gguf

    file = read_gguf(path)
    metadata = file.metadata
    with llama_cpp.LlamaCpp(path, context=CONTEXT, threads=torch.get_num_threads()) as loaded:
        yield Engine(
            kind_of_gguf(file),
            "llama.cpp",
            metadata.get("tokenizer.chat_template"),
            lambda text, special: loaded.tokenize(text, add_special=special),
            lambda ids: loaded.logits(list(ids)),
            tuple([*token_problems(metadata, tokenizer), *_end_problems(loaded, model, tokenizer)]),
        )


def _end_problems(loaded: llama_cpp.LlamaCpp, model: Any, tokenizer: Any) -> Iterator[str]:
    """Yield what would make llama.cpp go on behind the end of an answer."""
    for end in sorted(_ends(model, tokenizer)):
        if not loaded.ends_generation(end):
            token = tokenizer.convert_ids_to_tokens(end)
            yield f"llama.cpp does not stop at {token!r} (id {end}), which ends an answer"


def token_problems(metadata: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """Yield where the special tokens of a GGUF file are not the tokenizer's."""
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        ours, theirs = getattr(tokenizer, f"{name}_token_id"), metadata.get(f"tokenizer.ggml.{key}")
        if ours is not None and theirs is not None and ours != theirs:
            yield f"the file's {name.upper()} is token {theirs}, the tokenizer's {ours}"


def kind_of_gguf(file: "GgufFile") -> str:
    """Return the quant of a GGUF file as its metadata names it ("q4_k_m"), else the type of most of its bytes."""
    from gguf import LlamaFileType

    known = {int(kind): kind.name for kind in LlamaFileType if kind is not LlamaFileType.GUESSED}
    number = file.metadata.get("general.file_type")
    if number in known:
        return known[number].removeprefix("ALL_").removeprefix("MOSTLY_").lower()
    sizes: dict[str, int] = {}
    for entry in file.tensors.values():
        sizes[entry.type] = sizes.get(entry.type, 0) + entry.size
    return max(sizes, key=lambda kind: sizes[kind], default="unknown")


@contextmanager
def _without_llama_cpp(path: Path, model: Any, tokenizer: Any) -> Iterator[Engine]:
    from fastft.export.gguf.file import read_gguf
    from fastft.export.gguf_read import dequantised_model

    file = read_gguf(path)
    loaded = dequantised_model(file, model)
    notes = (
        f"{llama_cpp.why_unavailable()}. Without it the file's weights were dequantised and run through transformers: "
        "its tokenizer and llama.cpp's own arithmetic were not tried",
    )
    kind = kind_of_gguf(file)
    problems = tuple([*token_problems(file.metadata, tokenizer), *vocabulary_problems(file.metadata, tokenizer)])
    template = file.metadata.get("tokenizer.chat_template")
    yield Engine(kind, "transformers, dequantised", template, None, partial(run_model, loaded), problems, notes)


def vocabulary_problems(metadata: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """Yield where the vocabulary of a GGUF file is not the tokenizer's."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        yield "the file has no vocabulary (tokenizer.ggml.tokens)"
        return
    wrong = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= len(tokens) or tokens[i] != token]
    if wrong:
        index, token = min(wrong)
        theirs = tokens[index] if index < len(tokens) else "nothing"
        yield f"{len(wrong)} tokens of the vocabulary differ, such as id {index}: {token!r} here, {theirs!r} there"


def artefact_problem(path: Path) -> str:
    """Say why there is nothing at `path` that can be verified; nothing where there may be."""
    if not path.exists():
        return f"{path}: no such file or folder; give a merged folder, an adapter's folder or a .gguf file"
    if path.is_file() and path.suffix != ".gguf":
        return f"{path}: not a .gguf file; give the folder of a merged model, or a .gguf file"
    return ""
