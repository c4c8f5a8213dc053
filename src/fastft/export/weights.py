"""The weights of a trained model, one at a time: base and adapters merged in fp32, under their checkpoint names."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from fastft.errors import LoadError, Problem, UsageError, did_you_mean
from fastft.export import deltas
from fastft.export.folder import Found, assumptions, find_weights, load_folder
from fastft.export.stored import StoredTensor, stored_tensors
from fastft.given import refuse_export
from fastft.model import files
from fastft.model.dense import dense_like, dense_weight
from fastft.noise import quiet
from fastft.state import ModelState, base_model, get_state

BASES = ("dequantised", "original")


@frozen(eq=False)
class Weight:
    """One tensor of a checkpoint.

    `dtype` is that of the base (of the dequantised numbers, where it is held quantised), `module` the path of the
    module it belongs to. `linear`: it is the matrix of a linear layer; `adapted`: adapters change it.
    `read_base()` and `read()` give it as fp32, without and with adapters, on the device that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    linear: bool
    adapted: bool
    read_base: Callable[[], Tensor]
    read: Callable[[], Tensor]
    identity: tuple[Any, ...] = field(default=(), repr=False)


@frozen(eq=False)
class WeightSource:
    """All weights of a model as `save_pretrained` would name them, tied ones once; nothing is read before `read`.

    `config` is a copy of the model's config without quantisation; `folder` is where the base checkpoint lies, if it
    is known. `notes` are plain sentences about what a reader should know of these weights.
    """

    weights: Mapping[str, Weight]
    config: Any
    generation_config: Any
    tokenizer: Any
    folder: Path | None
    state: ModelState
    base: str
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint names, in the model's order."""
        return tuple(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self.weights[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a weight's base (of the dequantised numbers)."""
        return self.weights[name].dtype

    def read(self, name: str) -> Tensor:
        """Return a weight with all active adapters merged, in fp32, on the device that holds it."""
        return self.weights[name].read()

    def read_base(self, name: str) -> Tensor:
        """Return a weight without adapters, in fp32."""
        return self.weights[name].read_base()


def check_base(base: object) -> None:
    """Raise `UsageError` for a `base` that is none of `BASES`."""
    if base not in BASES:
        raise UsageError(Problem("base", base, "'dequantised' or 'original'", did_you_mean(str(base), BASES)))


def weight_source(model_or_folder: Any, base: str = "dequantised", device: torch.device | str = "cpu") -> WeightSource:
    """Return the weights of a model, or of a folder: a checkpoint, an adapter, or a run of fastft.

    * `base="dequantised"`: adapters are merged into the numbers that training saw, so the result is the model that was
      trained. `"original"`: weights that the model holds quantised (NF4, int8) are read from the 16-bit checkpoint it
      was loaded from instead, which is nearer to the published model, but not what the adapter was trained on.
    * Active adapters are merged; a disabled or inactive adapter is left out, as in the model's forward.
    * A checkpoint in safetensors is read tensor by tensor onto `device`; adapters and quantised checkpoints are loaded.

    Raises `UsageError` for what cannot be merged and `LoadError` for files that cannot be read.
    """
    check_base(base)
    refuse_export(model_or_folder, where="model_or_folder")
    if isinstance(model_or_folder, nn.Module):
        return _of_model(model_or_folder, base)
    with quiet():  # PEFT imports what warns then
        return _of_folder(Path(model_or_folder).expanduser(), base, device)


def _of_model(model: nn.Module, base: str) -> WeightSource:
    _check_peft(model)
    inner, state = base_model(model), get_state(model)
    notes: list[str] = []
    original = _original(inner, state) if base == "original" else None
    found = {n: w if w.dtype else evolve(w, dtype=inner.dtype) for n, w in _walk(inner, "", original)}
    weights = _untied(found, inner, notes)
    weights = _as_checkpoint(inner, weights)
    config = _plain_config(inner)
    if notes:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    folder = Path(state.source) if state.source and Path(state.source).is_dir() else None
    return WeightSource(
        weights,
        config,
        deepcopy(getattr(inner, "generation_config", None)),
        state.tokenizer,
        folder,
        state,
        base,
        tuple(notes),
    )


def _check_peft(model: Any) -> None:
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UsageError(
                f"adapter {name!r} is of the kind {kind}, which learns inputs and changes no weight, so it cannot be "
                "merged; save it as an adapter"
            )


def _plain_config(model: Any) -> Any:
    """Return a copy of the model's config that names its class and says nothing of quantisation."""
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if name in config.__dict__:
            delattr(config, name)
    return config


def _walk(module: nn.Module, path: str, original: Mapping[str, StoredTensor] | None) -> Iterator[tuple[str, Weight]]:
    """Yield every parameter and persistent buffer below `module` under the name it has without PEFT's wrappers."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        off = module.disable_adapters or not active
        yield from _walk(module.original_module if off else module.modules_to_save[active[0]], path, original)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _walk(module.token_adapter, path, original)
    elif isinstance(module, TrainableTokensLayer):
        yield from _with_rows(module, path, original)
    elif isinstance(module, LoraLayer):
        yield from _with_lora(module, path, original)
    elif isinstance(module, BaseTunerLayer):
        raise UsageError(
            f"{path}: an adapter of the kind {type(module).__name__} cannot be merged by fastft; merge it with PEFT "
            "(merge_and_unload) on a 16-bit model and pass the result"
        )
    else:
        yield from _own(module, path, original)
        for name, child in module.named_children():
            yield from _walk(child, f"{path}.{name}" if path else name, original)


def _own(module: nn.Module, path: str, original: Mapping[str, StoredTensor] | None) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors that the module itself holds."""
    held = {name: value for name, value in module._parameters.items() if value is not None}
    kept = module._non_persistent_buffers_set
    held |= {n: b for n, b in module._buffers.items() if b is not None and n not in kept}
    for name, value in held.items():
        full = f"{path}.{name}" if path else name
        if full.endswith((".SCB", ".weight_format")) or (name == "weight_scale" and dense_weight(module, "weight")):
            continue  # the scales of int8 and fp8 belong to the weight beside them
        shape, dtype, read = dense_like(full, name, module, value)
        if original is not None and dense_weight(module, name):
            read, dtype = _from_checkpoint(full, shape, original)
        linear = name == "weight" and isinstance(module, nn.Linear)
        yield full, Weight(full, shape, dtype, path, linear, False, read, read, identity=(id(value),))


def _with_rows(layer: Any, path: str, original: Any) -> Iterator[tuple[str, Weight]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(layer.base_layer, BaseTunerLayer):
        raise UsageError(f"{path}: token rows and another adapter on the same layer cannot be merged by fastft")
    for name, weight in _walk(layer.base_layer, path, original):
        if name == f"{path}.weight":
            read = partial(_apply, deltas.merged_rows, layer, weight.read_base)
            mark = (*weight.identity, id(layer.trainable_tokens_delta))
            weight = evolve(weight, read=read, adapted=True, identity=mark)
        yield name, weight


def _with_lora(layer: Any, path: str, original: Any) -> Iterator[tuple[str, Weight]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    deltas.check_layer(path, layer)
    of_parameter = getattr(layer, "parameter_name", None)
    if isinstance(layer.base_layer, BaseTunerLayer) and of_parameter is None:
        raise UsageError(f"{path}: two adapters of different kinds on the same layer cannot be merged by fastft")
    target = f"{path}.{of_parameter or 'weight'}"
    active = bool(deltas.adapters_at_work(layer))
    bias_seen = False
    for name, weight in _walk(layer.base_layer, path, original):
        if active and name == target:
            read = partial(_apply, deltas.merged_weight, layer, weight.read)
            weight = evolve(weight, read=read, adapted=True, identity=(*weight.identity, *_factors(layer)))
        elif active and name == f"{path}.bias" and deltas.has_extra_bias(layer):
            read = partial(_apply, partial(deltas.merged_bias, path), layer, weight.read)
            weight = evolve(weight, read=read, adapted=True, identity=(*weight.identity, id(layer)))
        bias_seen = bias_seen or name == f"{path}.bias"
        yield name, weight
    if active and deltas.has_extra_bias(layer) and not bias_seen:
        raise UsageError(f"{path}: the adapter has a bias (lora_bias) and the base layer has none to merge it into")


def _apply(merge: Callable[[Any, Tensor], Tensor], layer: Any, read: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return merge(layer, read())


def _factors(layer: Any) -> list[tuple[Any, ...]]:
    """Return marks that are equal for two tied layers whose adapters share A and B (transposed in an embedding)."""
    marks = []
    for name in deltas.adapters_at_work(layer):
        if name in layer.lora_embedding_A:
            left, right = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
        # DoRA scales the rows of a head and the columns of an embedding, so these are never one weight
        own = id(layer) if deltas.is_dora(layer, name) else None
        marks.append((left.data_ptr(), right.data_ptr(), layer.scaling[name], own))
    return marks


def _untied(weights: dict[str, Weight], model: Any, notes: list[str]) -> dict[str, Weight]:
    """Keep one of two weights that are the same tensor with the same adapters; note a tie that adapters have broken."""
    tied = {}
    for other, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if other in weights and source in weights:
            if weights[other].identity == weights[source].identity:
                tied[other] = source
            elif weights[other].identity[0] == weights[source].identity[0]:
                notes.append(
                    f"{other} and {source} shared one weight and their adapters differ: they are two weights now, and "
                    "the config says so (tie_word_embeddings is False)"
                )
            else:
                notes.append(f"{other} and {source} are two weights now; the config says so")
    return {name: weight for name, weight in weights.items() if name not in tied}


def _as_checkpoint(model: Any, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Give the weights the names and the layout that a checkpoint of this architecture has."""
    from transformers.core_model_loading import revert_weight_conversion

    model = _as_dense(model)

    def stored(names: Mapping[str, Weight]) -> dict[str, Tensor]:
        with torch.device("meta"):
            return revert_weight_conversion(model, {n: torch.empty(w.shape) for n, w in names.items()})

    whole = stored(weights)
    if set(whole) == set(weights):
        return weights
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        for new, shape in ((key, tuple(value.shape)) for key, value in stored({name: weight}).items()):
            read, read_base = (partial(_converted, model, name, new, get) for get in (weight.read, weight.read_base))
            found[new] = evolve(weight, name=new, shape=shape, read=read, read_base=read_base)
    if set(found) != set(whole):
        raise UsageError(
            f"{type(model).__name__}: its checkpoints put several tensors of the model into one (such as "
            f"{min(set(found) ^ set(whole))}), which cannot be written tensor by tensor"
        )
    return found


def _as_dense(model: Any) -> Any:
    """Return the model without the conversions that read quantised numbers from its checkpoint, if it has any.

    They have no reverse in transformers; what is written is dequantised and needs none. The model itself keeps them.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    kept = [conversion for conversion in conversions if _has_reverse(conversion)]
    if len(kept) == len(conversions):
        return model
    dense = copy(model)
    dense._weight_conversions = kept
    return dense


def _has_reverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _converted(model: Any, name: str, new: str, read: Callable[[], Tensor]) -> Tensor:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {name: read()})[new]


def _original(model: Any, state: ModelState) -> Mapping[str, StoredTensor]:
    """Return the 16-bit tensors of the checkpoint that the model was loaded from."""
    source = state.source or getattr(model, "name_or_path", "")
    if not source:
        raise UsageError("base='original': it is not known which checkpoint this model was loaded from")
    if state.loftq:
        raise UsageError(
            "base='original': this adapter was started by LoftQ at what quantisation took away, so it fits the "
            "dequantised base alone; leave base='dequantised'"
        )
    folder = files.locate(str(source), state.revision)
    if not (folder / "config.json").is_file() or files.read_json(folder / "config.json").get("quantization_config"):
        raise UsageError(
            f"base='original': {source!r} is itself stored quantised; leave base='dequantised', or load the 16-bit "
            "checkpoint with quant='nf4' and put the adapter on it"
        )
    return stored_tensors(folder)


def _from_checkpoint(
    name: str, shape: tuple[int, ...], original: Mapping[str, StoredTensor]
) -> tuple[Callable[[], Tensor], torch.dtype]:
    tensor = original.get(name)
    if tensor is None or tensor.shape != shape:
        found = "nothing under that name" if tensor is None else f"shape {list(tensor.shape)}"
        raise LoadError(
            f"base='original': {name} {list(shape)} is needed from the 16-bit checkpoint, which has {found} in its "
            "safetensors; leave base='dequantised'"
        )
    return (lambda: tensor.read().float()), tensor.dtype


def _of_folder(folder: Path, base: str, device: torch.device | str) -> WeightSource:
    found = find_weights(folder)
    if found.adapter or found.quantised:
        return _loaded(found, base)
    stored = stored_tensors(found.folder)
    from fastft.model.tokenizer import load_tokenizer

    skeleton, generation = found.skeleton()
    expected = _untied(dict(_walk(skeleton, "", None)), skeleton, [])
    names = _as_checkpoint(skeleton, expected)
    if not stored or not set(names) <= set(stored):
        return _loaded(found, base)  # pickled, or with names of an older transformers
    wrong = [name for name, weight in names.items() if stored[name].shape != weight.shape]
    if wrong:
        raise LoadError(
            *(
                f"{stored[name].path}: {name} has the shape {list(stored[name].shape)}, and config.json asks for "
                f"{list(names[name].shape)}"
                for name in wrong[:10]
            )
        )
    weights = {name: _of_file(weight, stored[name], device) for name, weight in names.items()}
    tokenizer = load_tokenizer(found.folder) if files.has_tokenizer(found.folder) else None
    state = ModelState(source=str(found.folder), tokenizer=tokenizer)
    config = _plain_config(skeleton)
    return WeightSource(weights, config, generation, tokenizer, found.folder, state, base, found.notes)


def _loaded(found: Found, base: str) -> WeightSource:
    source = _of_model(load_folder(found), base)
    return evolve(source, notes=(*source.notes, *assumptions(found)))


def _of_file(weight: Weight, tensor: StoredTensor, device: torch.device | str) -> Weight:
    def read() -> Tensor:
        return tensor.read(device).float()

    return evolve(weight, dtype=tensor.dtype, read=read, read_base=read)
