"""Importing all of fastft changes nothing of others: no class, function, flag, logger or environment variable."""

import json
import subprocess
import sys

import pytest

SCRIPT = '''
import importlib, json, logging, os, pkgutil, signal, sys, types, warnings
import accelerate, bitsandbytes, datasets, peft, torch, transformers, trl
import matplotlib.figure, torch._dynamo, torch._inductor.compile_fx, torch.distributed.fsdp
import torch._inductor.config, torch._functorch.config
import transformers.masking_utils, trl.trainer.sft_trainer, peft.tuners.lora
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OTHERS = ("accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "torch", "transformers", "trl")


def attributes():
    """Return the identity of every function and class attribute of other packages' loaded modules."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in OTHERS or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType):
                found[f"{name}.{key}"] = id(value.__code__), id(value)
            elif isinstance(value, type) and value.__module__ == name:
                for attribute, entry in list(vars(value).items()):
                    inner = getattr(entry, "__func__", entry)
                    if isinstance(inner, types.FunctionType):
                        found[f"{name}.{key}.{attribute}"] = id(inner.__code__), id(inner)
    return found


def settings():
    loggers = {n: l for n, l in logging.root.manager.loggerDict.items() if isinstance(l, logging.Logger)}
    loggers["root"] = logging.root
    configs = {c.__name__: repr(sorted(c.get_config_copy().items(), key=lambda kv: kv[0]))
               for c in (torch._dynamo.config, torch._inductor.config, torch._functorch.config)}
    return {
        "environ": dict(os.environ),
        "torch": [str(torch.get_default_dtype()), torch.get_float32_matmul_precision(), torch.get_num_threads(),
                  torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
                  torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.initial_seed()],
        "logging": {n: [l.level, l.propagate, l.disabled, len(l.handlers), len(l.filters)] for n, l in loggers.items()},
        "warnings": len(warnings.filters),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [id(sys.excepthook), id(sys.displayhook), len(sys.meta_path), len(sys.path)],
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        **configs,
    }


before, flags = attributes(), settings()
import fastft
CHANGE
names = [m.name for m in pkgutil.walk_packages(fastft.__path__, "fastft.") if not m.name.endswith(".triton")]
for name in names:
    importlib.import_module(name)
after, later = attributes(), settings()
changed = sorted(key for key, value in before.items() if after.get(key) != value)
for key, value in flags.items():
    new = later[key]
    if isinstance(value, dict):
        changed += [f"{key}:{k}" for k, v in value.items() if new.get(k) != v]
    elif new != value:
        changed.append(key)
print(json.dumps({"changed": changed, "modules": len(names), "watched": len(before)}))
'''


def look(change=""):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("CHANGE", change)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_every_module_changes_nothing():
    found = look()
    assert found["changed"] == []
    assert found["modules"] > 80 and found["watched"] > 10_000


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("LlamaForCausalLM.forward = lambda self: None", "modeling_llama.LlamaForCausalLM.forward"),
        ("trl.trainer.sft_trainer.SFTTrainer.compute_loss = print_ = lambda self: None", "SFTTrainer.compute_loss"),
        ("os.environ['A'] = 'b'; os.environ.pop('PATH')", "environ:PATH"),
        ("torch._dynamo.config.specialize_float = True", "torch._dynamo.config"),
        ("logging.getLogger('transformers').setLevel(50)", "logging:transformers"),
    ],
)
def test_the_look_can_fail(change, name):
    assert any(changed.endswith(name) for changed in look(change)["changed"])
