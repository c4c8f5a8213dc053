"""Put a LoRA adapter on a loaded model through PEFT."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from fastft.errors import Problem, UsageError, argument_names, did_you_mean, unknown_arguments
from fastft.given import model_problem, refuse
from fastft.model import patterns
from fastft.model.loftq import start_from_residual
from fastft.noise import between_libraries, quiet
from fastft.state import ModelState, base_model, get_state, quant_of, update_state

Targets = str | Sequence[str] | None
INITS = (True, False, "gaussian", "pissa", "pissa_niter_N", "olora", "orthogonal", "loftq")
# PiSSA with a randomised decomposition is repeated when the adapter is loaded again, with this seed.
DEFAULT_SEED = 3407
_NEEDS_DATA = ("eva", "corda", "lora_ga")
# Initialisations that subtract the adapter from the base weight and so must be able to write it.
_WRITES_BASE = ("pissa",)
# Fields of LoraConfig that add_lora passes on under PEFT's own names.
PASSED_ON = ("alpha_pattern", "exclude_modules", "lora_bias", "rank_pattern", "target_parameters")
_RENAMED = {
    "rank": "r",
    "lora_rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "random_state": "seed",
    "trainable_token_indices": "train_tokens",
    "ensure_weight_tying": "nothing: tied weights are always kept tied",
}


def add_lora(
    model: Any,
    r: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Targets = "all-linear",
    bias: str = "none",
    rslora: bool = False,
    dora: bool = False,
    init: bool | str = True,
    modules_to_save: Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    train_tokens: str | Sequence[int] | None = "added",
    seed: int = DEFAULT_SEED,
    **options: Any,
) -> Any:
    """Return a PEFT model with a LoRA adapter of rank `r` on `model`, all other weights frozen.

    The adapter adds `scale * B(A(dropout(x)))`, scale = alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski
    2023, arXiv 2312.03732); `dora` learns the magnitude of each output besides (Liu et al. 2024, arXiv 2402.09353).

    * `targets`: "all-linear" (every linear layer but the head), "spec" (the family's own list), names or a name, or a
      regular expression for the whole path of a module. The head is adapted only if it is named.
    * `modules_to_save`: modules trained whole and saved with the adapter, such as ["embed_tokens", "lm_head"]. Where
      these two share one weight they go on sharing it.
    * `train_tokens`: rows of embeddings and head that are trained on their own: "added" are those made by `add_tokens`,
      or give ids, or None. Rows of a module in `modules_to_save` are trained with it.
    * `layers`: the layers to adapt, by index; None means all.
    * `init`: True (B zero), False (random: for tests), or a name of `INITS`. PiSSA and OLoRA change the base
      weights; LoftQ starts an NF4 model at the error of its quantisation.
    * `options`: the fields of PEFT's LoraConfig named in `PASSED_ON`.

    A and B are kept in fp32 when the base is in 16 or fewer bits (PEFT's default). The same `seed` gives the same
    adapter, and torch's global random state is left as it was. Raises `UsageError` with all mistakes at once.
    """
    given = {
        "r": r, "alpha": alpha, "dropout": dropout, "bias": bias, "init": init, "rslora": rslora, "dora": dora,
        "modules_to_save": modules_to_save, "layers": layers, "layers_pattern": layers_pattern,
        "targets": targets, "train_tokens": train_tokens, "seed": seed,
    }  # fmt: skip
    refuse(model_problem(model))
    problems = problems_of(model, given, options)
    if problems:
        raise UsageError(*problems)
    base, state = base_model(model), get_state(model)
    config = _config(base, state, given, options)
    tokens = _token_notes(config.trainable_token_indices)
    adapted, notes = _adapt(base, state, config, seed, init == "loftq")
    notes += _wasted(adapted)
    adapted.train(model.training)
    if notes or tokens:
        update_state(adapted, notes=(*state.notes, *notes, *tokens))
    return adapted


def _config(base: Any, state: ModelState, given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Return PEFT's LoraConfig for the arguments `given` to `add_lora` and its further `options`."""
    from peft import LoraConfig

    chosen, tied = _choose_targets(base, state, given["targets"]), _tied(base)
    whole = _keep_tied(list(given["modules_to_save"] or ()), tied)
    tokens = _token_rows(base, state, given["train_tokens"], whole, tied)
    layers = given["layers"]
    return LoraConfig(
        r=given["r"],
        lora_alpha=given["alpha"],
        lora_dropout=given["dropout"],
        target_modules=chosen,
        bias=given["bias"],
        use_rslora=given["rslora"],
        use_dora=given["dora"],
        init_lora_weights=True if given["init"] == "loftq" else given["init"],
        modules_to_save=whole or None,
        layers_to_transform=layers if layers is None or isinstance(layers, int) else list(layers),
        layers_pattern=given["layers_pattern"],
        trainable_token_indices=tokens or None,
        ensure_weight_tying=bool(tied) and (bool(whole and set(whole) & set(tied)) or bool(_names_any(chosen, tied))),
        task_type="CAUSAL_LM",
        revision=state.revision,
        **options,
    )


def _adapt(base: Any, state: ModelState, config: Any, seed: int, loftq: bool) -> tuple[Any, list[str]]:
    """Return the PEFT model, drawn with `seed`, and what is to be noted; with `loftq` it starts at NF4's error."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=cuda_devices(base)), quiet(), between_libraries():
        torch.manual_seed(seed)
        adapted = get_peft_model(base, config)
        if not loftq:
            return adapted, []
        try:
            count = start_from_residual(base, state.source, state.revision)
        except UsageError:
            adapted.unload()  # the model is as it was
            raise
    update_state(adapted, loftq=True)
    return adapted, [f"LoftQ: {count} layers start at what NF4 took away; load this adapter with quant='nf4'"]


def _token_notes(tokens: Mapping[str, Sequence[int]] | None) -> list[str]:
    if not tokens:
        return []
    rows = len(next(iter(tokens.values())))
    return [f"{rows} token rows of {' and '.join(tokens)} are trained with the adapter"]


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the indices of the CUDA devices that hold the model's weights."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def linear_names(model: nn.Module, head: bool = False) -> list[str]:
    """Return the paths of the linear layers (dense or quantised) of a transformers model, without its head."""
    out = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and (head or m is not out)]


def problems_of(model: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> list[Problem | str]:
    """Return what is wrong with the named arguments of `add_lora` and its further `options`."""
    problems: list[Problem | str] = []
    state = get_state(model)
    if state.full:
        problems.append(
            "add_lora: the model was loaded with full=True, every weight is trained already; train it as it is, or "
            "load it without full to train an adapter"
        )
    if getattr(model, "peft_config", None):
        problems.append(
            "add_lora: the model already carries an adapter; train that one, or merge it (merge_and_unload) before "
            "adding another"
        )
    problems += _number_problems(given)
    problems += _init_problems(given["init"], given["r"], given["dora"], quant_of(model), state.source)
    if str(given["init"]).startswith("pissa_niter") and given["seed"] != DEFAULT_SEED:
        remedy = (
            "Loading the adapter repeats the random decomposition with this seed; or take init='pissa', which is exact."
        )
        problems.append(Problem("seed", given["seed"], f"{DEFAULT_SEED} with init={given['init']!r}", remedy))
    problems += [*_rank_problems(base_model(model), given["r"]), *_module_problems(model, given)]
    problems += patterns.problems(base_model(model), options)
    return problems + _option_problems(options)


def _number_problems(given: Mapping[str, Any]) -> list[Problem]:
    r, alpha, dropout, bias = given["r"], given["alpha"], given["dropout"], given["bias"]
    problems = []
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(Problem("r", r, "a whole number of at least 1", "8, 16 or 32 are usual."))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not alpha > 0:
        problems.append(Problem("alpha", alpha, "a number above 0", "r or 2 * r are usual."))
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        problems.append(Problem("dropout", dropout, "a number from 0 up to but not including 1"))
    if bias not in ("none", "all", "lora_only"):
        problems.append(
            Problem("bias", bias, "'none', 'all' or 'lora_only'", did_you_mean(str(bias), ("none", "all", "lora_only")))
        )
    return problems


def _rank_problems(base: nn.Module, r: Any) -> list[Problem]:
    """Return what is wrong with a rank that no linear layer of the model has room for."""
    inner = [module for module in base.modules() if module is not base.get_output_embeddings()]
    most = patterns.largest_rank(inner) or patterns.largest_rank(base.modules())
    if most is None or not isinstance(r, int) or r <= most:
        return []
    remedy = "A layer's change has no higher rank than its smaller dimension: what is above it is computed for nothing."
    return [Problem("r", r, f"at most {most}, the largest rank that a layer of this model can have", remedy)]


def _wasted(adapted: nn.Module) -> list[str]:
    """Return a note on layers whose smaller dimension is below the rank of their adapter."""
    from peft.tuners.lora.layer import LoraLayer

    wasted = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and module.r:
            least, rank = min(module.in_features, module.out_features), max(module.r.values())
            if rank > least:
                wasted[name.rpartition(".")[2]] = f"{least} in {name.rpartition('.')[2]}"
    if not wasted:
        return []
    return [
        f"the rank is above the smaller dimension of some layers, where it adds nothing: {', '.join(wasted.values())}"
    ]


def _init_problems(init: Any, r: Any, dora: Any, quant: str | None, source: str) -> list[Problem]:
    """Return what is wrong with `init` on a model in `quant`, loaded from `source`; that is "" where others did so."""
    if quant == "fp8" and (dora or init == "olora"):  # PEFT would take the bytes for the weights
        name, value, allowed = ("dora", dora, "False") if dora else ("init", init, "True or 'gaussian'")
        remedy = "It reads the base weights: load with quant='nf4' or None."
        return [Problem(name, value, f"{allowed} on a model in fp8", remedy)]
    if isinstance(init, bool):
        return []
    names = [name for name in INITS if isinstance(name, str)]
    if init in _NEEDS_DATA:
        return [
            Problem(
                "init",
                init,
                f"True, False or one of {names}",
                "It needs training data; use PEFT's own function for it.",
            )
        ]
    if (
        not isinstance(init, str)
        or not (init in names or re.fullmatch(r"pissa_niter_\d+", init))
        or init == "pissa_niter_N"
    ):
        return [Problem("init", init, f"True, False or one of {names}", did_you_mean(str(init), names))]
    if init.startswith(_WRITES_BASE) and quant:
        remedy = f"{init!r} starts from the 16-bit weights and changes them: load with quant=None."
        return [Problem("init", init, f"True, 'gaussian' or 'olora' on a model in {quant}", remedy)]
    if init == "orthogonal" and isinstance(r, int) and r % 2:
        return [Problem("r", r, "an even rank for init='orthogonal'")]
    if init == "loftq" and (quant != "nf4" or not source):
        remedy = "LoftQ makes up for 4-bit quantisation, by the 16-bit weights: load with quant='nf4' by fastft.load."
        kind = f"a model in {quant or '16 bits'}" + ("" if source else " that fastft did not load")
        return [Problem("init", init, f"another initialisation on {kind}", remedy)]
    if init == "loftq" and dora:
        return [Problem("dora", dora, "False with init='loftq'", "DoRA's magnitudes are taken before LoftQ starts.")]
    return []


def _module_problems(model: Any, given: Mapping[str, Any]) -> list[Problem]:
    base = base_model(model)
    names = [name for name, _ in base.named_modules() if name]
    last = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    problems = []
    for module in given["modules_to_save"] or ():
        if not _matching(names, module):
            problems.append(
                Problem("modules_to_save", module, "the name of a module of this model", _near(module, last))
            )
    problems += _target_problems(base, given["targets"])
    count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    layers = given["layers"]
    wanted = [] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    bad = [index for index in wanted if not isinstance(index, int) or (count is not None and not 0 <= index < count)]
    if bad:
        problems.append(Problem("layers", bad, f"indices from 0 to {(count or 0) - 1}"))
    if wanted and _is_regex(given["targets"]):
        problems.append(
            Problem(
                "layers", layers, "None together with a regular expression", "Write the layers into the expression."
            )
        )
    if given["layers_pattern"] is not None and not wanted:
        problems.append(Problem("layers_pattern", given["layers_pattern"], "None unless layers are given"))
    tokens = given["train_tokens"]
    rows = base.get_input_embeddings().weight.shape[0]
    if isinstance(tokens, str) and tokens != "added":
        problems.append(Problem("train_tokens", tokens, "'added', token ids, or None"))
    elif tokens is not None and not isinstance(tokens, str):
        wrong = [t for t in tokens if not isinstance(t, int) or not 0 <= t < rows]
        if wrong:
            problems.append(Problem("train_tokens", wrong, f"token ids from 0 to {rows - 1}"))
    return problems


def _target_problems(base: Any, targets: Targets) -> list[Problem]:
    if targets in ("all-linear", "spec", None):
        return []
    linears = linear_names(base, head=True)
    able = [name for name, m in base.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    last = sorted({name.rpartition(".")[2] for name in linears})
    if _is_regex(targets):
        try:
            found = any(re.fullmatch(targets, name) for name in able)
        except re.error as error:
            return [
                Problem(
                    "targets",
                    targets,
                    "a regular expression or names of linear layers",
                    f"It does not compile: {error}.",
                )
            ]
        remedy = f"It must match the whole path of a module, such as {linears[0]!r}."
        return [] if found else [Problem("targets", targets, "an expression that matches a linear layer", remedy)]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        return [Problem("targets", targets, "at least one linear layer", f"There are {', '.join(last)}.")]
    return [
        Problem("targets", target, "the name of a linear layer", _near(target, last))
        for target in wanted
        if not isinstance(target, str) or not _matching(able, target)
    ]


def _option_problems(options: Mapping[str, Any]) -> list[str]:
    from peft import LoraConfig

    known = [*argument_names(add_lora), *PASSED_ON]
    hint = "PEFT knows it but add_lora does not pass it on; build the adapter with peft.get_peft_model"
    return unknown_arguments("add_lora", options, known, _RENAMED, {field.name: hint for field in fields(LoraConfig)})


def _matching(names: list[str], wanted: str) -> list[str]:
    return [name for name in names if name == wanted or name.endswith(f".{wanted}")]


def _near(word: Any, choices: Sequence[str]) -> str:
    near = get_close_matches(str(word), choices, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return f"{hint}There are {', '.join(choices)}."


def _is_regex(targets: Targets) -> bool:
    """A single text is an expression unless it reads as a plain (dotted) name or one of the two keywords."""
    return (
        isinstance(targets, str)
        and targets not in ("all-linear", "spec")
        and re.fullmatch(r"[\w.]*\w", targets) is None
    )


def _choose_targets(base: Any, state: ModelState, targets: Targets) -> list[str] | str:
    linears = linear_names(base)
    if targets in ("spec", None) and state.spec is not None:
        there = [name for name in state.spec.lora_targets if _matching(linears, name)]
        if there:
            return there
    if targets in ("all-linear", "spec", None):
        return sorted({name.rpartition(".")[2] for name in linears})
    if isinstance(targets, str):
        return targets if _is_regex(targets) else [targets]
    return list(dict.fromkeys(targets))


def _tied(base: Any) -> tuple[str, str] | tuple[()]:
    """Return the names of embeddings and head if they share one weight."""
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return ()
    return _name_of(base, embeddings), _name_of(base, head)


def _name_of(base: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in base.named_modules() if module is wanted).rpartition(".")[2]


def _keep_tied(whole: list[str], tied: Sequence[str]) -> list[str]:
    """Where a tied module is trained whole, name the embeddings only: PEFT then ties the head's copy to theirs."""
    if not tied or not set(whole) & set(tied):
        return list(dict.fromkeys(whole))
    return list(dict.fromkeys(tied[0] if name in tied else name for name in whole))


def _names_any(targets: list[str] | str, names: Sequence[str]) -> list[str]:
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if name in targets]


def _token_rows(
    base: Any, state: ModelState, wanted: str | Sequence[int] | None, whole: list[str], tied: Sequence[str]
) -> dict[str, list[int]]:
    """Return the token rows to train, by module; none for modules that are trained whole."""
    ids = list(state.added_tokens) if wanted == "added" else list(wanted or ())
    head = base.get_output_embeddings()
    names = [_name_of(base, base.get_input_embeddings())]
    if head is not None and not tied:
        names.append(_name_of(base, head))
    return {name: ids for name in names if name not in whole} if ids else {}
