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
import trl.trainer.grpo_trainer, trl.trainer.dpo_trainer, trl.trainer.kto_trainer
import trl.experimental.cpo.cpo_trainer, trl.experimental.orpo.orpo_trainer
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


def changes(before, flags):
    after, later = attributes(), settings()
    changed = sorted(key for key, value in before.items() if after.get(key) != value)
    for key, value in flags.items():
        new = later[key]
        if isinstance(value, dict):
            changed += [f"{key}:{k}" for k, v in value.items() if new.get(k) != v]
        elif new != value:
            changed.append(key)
    return changed


# name of what is changed -> what changes it
FAULTS = {
    "modeling_llama.LlamaForCausalLM.forward": lambda: setattr(LlamaForCausalLM, "forward", lambda self: None),
    "SFTTrainer.compute_loss": lambda: setattr(trl.trainer.sft_trainer.SFTTrainer, "compute_loss", lambda self: None),
    "environ:PATH": lambda: os.environ.pop("PATH"),
    "torch._dynamo.config": lambda: setattr(torch._dynamo.config, "specialize_float", True),
    "logging:transformers": lambda: logging.getLogger("transformers").setLevel(50),
}


def changes_after(fault, before, flags):
    """Commit a fault in a fork of this process, and return what has changed there."""
    sys.stdout.flush()
    out, into = os.pipe()
    if not os.fork():
        fault()
        with os.fdopen(into, "w") as pipe:
            json.dump(changes(before, flags), pipe)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        found = json.load(pipe)
    os.wait()
    return found


before, flags = attributes(), settings()
import fastft
names = [m.name for m in pkgutil.walk_packages(fastft.__path__, "fastft.") if not m.name.endswith(".triton")]
for name in names:
    importlib.import_module(name)
changed = changes(before, flags)
faults = {name: changes_after(fault, before, flags) for name, fault in FAULTS.items()}
print(json.dumps({"changed": changed, "faults": faults, "modules": len(names), "watched": len(before)}))
'''


@pytest.fixture(scope="module")
def look():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_every_module_changes_nothing(look):
    assert look["changed"] == []
    assert look["modules"] > 80 and look["watched"] > 10_000


def test_the_look_can_fail(look):
    assert len(look["faults"]) == 5
    for name, changed in look["faults"].items():
        assert any(found.endswith(name) for found in changed), name
