"""Arguments that scripts pass and fastft has no use for, or cannot serve yet: what to say about each."""

from collections.abc import Collection, Mapping
from typing import Any

from attrs import frozen

from fastft.errors import Problem, did_you_mean, unknown_arguments

_VLLM = "it sets up vLLM, which fast_inference=True asks for"
_STANDBY = "the engine always sleeps while training steps run"
# Arguments of from_pretrained that an engine takes, which has no meaning without one.
OF_ENGINE = {"float8_kv_cache": _VLLM, "gpu_memory_utilization": _VLLM, "max_lora_rank": _VLLM}
_COMPILE = "fastft.compile(model) compiles the layers, and the trainer calls it"

# Arguments of from_pretrained without a meaning here -> why.
IDLE_IN_LOADING = {
    "conservativeness": "the engine's part of the GPU is worked out from what training holds",
    "device_map_planner_kwargs": "the whole model goes to one device, or with device_map='auto' over all",
    "disable_log_stats": "vLLM's statistics are not logged",
    "fix_tokenizer": "EOS, BOS and pad token are always put right, and fastft.state.get_state(model).notes says how",
    "float32_mixed_precision": "the weights are kept in `dtype`; dtype=torch.float32 trains fp32 weights",
    "fullgraph": _COMPILE,
    "local_files_only": "local folders and the hub cache always come first; HF_HUB_OFFLINE=1 forbids the network",
    "low_cpu_mem_usage": "weights are always read one tensor at a time",
    "offload_embedding": "the embeddings stay on the model's device",
    "random_state": "nothing is random in loading; get_peft_model(random_state=...) seeds the adapter",
    "return_logits": "calling the model returns its logits",
    "temporary_location": "nothing is moved to the disk",
    "unsloth_force_compile": _COMPILE,
    "unsloth_tiled_mlp": "the memory plan decides what is kept for the backward pass",
    "unsloth_vllm_standby": _STANDBY,
    "use_async": "rollouts and training steps take turns",
    "use_exact_model_name": "names are never replaced by others",
}
# Arguments of from_pretrained that fastft cannot serve -> what to do instead.
REFUSED_IN_LOADING = {
    "auto_model": "Causal language models alone are loaded; leave it out.",
    "config": "Save the changed config.json in the model's folder and load that.",
    "gguf_file": "Load the safetensors checkpoint that the GGUF file was made from.",
    "load_in_fp8": "Take load_in_4bit=True, load_in_8bit=True or load_in_16bit=True.",
    "num_labels": "Sequence classification is not supported; load the model with transformers.",
    "qat_scheme": "Quantisation-aware training is not supported yet: train without it and quantise afterwards.",
    "resize_model_vocab": "Add tokens with fastft.add_tokens(model, tokenizer, tokens), which makes their rows.",
    "rope_scaling": "Set max_seq_length: the rope scaling that it needs is put in by itself.",
    "subfolder": "Download the repository and pass the path of that folder.",
    "text_only": "Models with other inputs than text are not supported yet; load a text model.",
    "tokenizer_name": "Load that tokenizer with transformers' AutoTokenizer, and see that its ids fit the model.",
    "use_auth_token": "It is called token now.",
    "whisper_language": "Speech is not supported.",
    "whisper_task": "Speech is not supported.",
}
# The same two for get_peft_model.
IDLE_IN_ADAPTERS = {
    "autocast_adapter_dtype": "A and B are kept in fp32 where the base is in 16 or fewer bits",
    "checkpoint_skip_layers": "the memory plan is the same for every layer",
    "ensure_weight_tying": "tied weights are always kept tied",
    "finetune_audio_layers": "this is a text model",
    "finetune_vision_layers": "this is a text model",
    "offload_layers": "all layers stay on the model's device",
    "temporary_location": "nothing is moved to the disk",
}
REFUSED_IN_ADAPTERS = {
    "corda_config": "Take init_lora_weights=True, 'gaussian', 'pissa', 'olora' or 'loftq'.",
    "eva_config": "Take init_lora_weights=True, 'gaussian', 'pissa', 'olora' or 'loftq'.",
    "layer_replication": "Build such an adapter with peft.get_peft_model.",
    "qat_scheme": "Quantisation-aware training is not supported yet: train without it and quantise afterwards.",
    "use_qalora": "Build such an adapter with peft.get_peft_model.",
}
# Values at which an argument asks for nothing, where these are not just None and False.
_ASKS_NOTHING = {
    "autocast_adapter_dtype": (None, True),
    "ensure_weight_tying": (None, False, True),
    "fix_tokenizer": (None, True),
    "low_cpu_mem_usage": (None, False, True),
    "offload_embedding": (None, False, "auto"),
}


@frozen
class Sorted:
    """Further arguments of a call: those that pass on, lines to print about idle ones, and what is wrong."""

    passed: Mapping[str, Any]
    lines: tuple[str, ...]
    problems: tuple[Problem | str, ...]


def sort_out(
    owner: str,
    options: Mapping[str, Any],
    known: Collection[str],
    passed_on: Collection[str],
    idle: Mapping[str, str],
    refused: Mapping[str, str],
) -> Sorted:
    """Tell apart what `owner` passes on, has no use for, cannot serve and does not know."""
    passed, lines, problems = {}, [], []
    for name, value in options.items():
        if name in passed_on:
            passed[name] = value
        elif name in idle:
            if not _asks_nothing(name, value):
                shown = "(not shown)" if name == "token" else value
                lines.append(f"fastft: {owner}({name}={shown!r}) has no effect: {idle[name]}.")
        elif name in refused:
            if not _asks_nothing(name, value):
                problems.append(Problem(f"{owner} {name}", value, "to be left out", refused[name]))
        else:
            problems += unknown_arguments(owner, [name], [*known, *passed_on], unlisted=[*idle, *refused])
    return Sorted(passed, tuple(lines), tuple(problems))


def _asks_nothing(name: str, value: Any) -> bool:
    return value in _ASKS_NOTHING.get(name, (None, False))


def plan_for(owner: str, checkpointing: bool | str | None) -> tuple[str | None, Problem | None]:
    """Return the memory plan that `use_gradient_checkpointing` asks for (None: as it is), and what is wrong with it."""
    if checkpointing is None:
        return None, None
    if checkpointing is True or checkpointing == "unsloth":
        return "min", None
    if checkpointing is False:
        return "keep", None
    remedy = did_you_mean(str(checkpointing), ("unsloth",))
    where = f"{owner} use_gradient_checkpointing"
    return None, Problem(where, checkpointing, "True, False or 'unsloth'", remedy)
