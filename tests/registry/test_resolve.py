"""Looking a family up by every kind of target, and adding families."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import evolve

import fastft.registry.resolve as registry
from fastft.errors import SpecError
from fastft.registry.resolve import find, match, register, resolve, specs
from fastft.registry.spec import ModelSpec

MINE = ModelSpec("mine", ("mine_type",), ("MineDecoderLayer",), patterns=("Mine-*",))

# model id -> (spec, chat format)
IDS = {
    "meta-llama/Llama-2-7b-chat-hf": ("llama", "llama-2"),
    "codellama/CodeLlama-7b-Instruct-hf": ("llama", "llama-2"),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", "llama-3"),
    "meta-llama/Llama-3.1-8B": ("llama", "llama-3.1"),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", "llama-3.1"),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", "llama-3.1"),
    "unsloth/Llama-3.2-3B-Instruct-bnb-4bit": ("llama", "llama-3.1"),
    "NousResearch/Hermes-3-Llama-3.1-8B": ("llama", "chatml"),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("llama", "deepseek-r1"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("llama", "zephyr"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", "chatml"),
    "HuggingFaceTB/SmolLM-360M": ("llama", "chatml"),
    "ibm-granite/granite-8b-code-instruct-4k": ("llama", "granite-code"),
    "mistralai/Mistral-7B-v0.1": ("mistral", "mistral-v1"),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", "mistral-v3"),
    "mistralai/Mistral-Nemo-Instruct-2407": ("mistral", "mistral-v3-tekken"),
    "mistralai/Mistral-Small-24B-Instruct-2501": ("mistral", "mistral-v7-tekken"),
    "mistralai/Ministral-8B-Instruct-2410": ("mistral", "mistral-v3-tekken"),
    "HuggingFaceH4/zephyr-7b-beta": ("mistral", "zephyr"),
    "teknium/OpenHermes-2.5-Mistral-7B": ("mistral", "chatml"),
    "Qwen/Qwen1.5-0.5B-Chat": ("qwen2", "chatml"),
    "Qwen/Qwen2-7B-Instruct": ("qwen2", "chatml"),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", "qwen-2.5"),
    "Qwen/Qwen2.5-Coder-32B-Instruct": ("qwen2", "qwen-2.5"),
    "Qwen/QwQ-32B": ("qwen2", "qwen-3-thinking"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", "deepseek-r1"),
    "Qwen/Qwen3-0.6B": ("qwen3", "qwen-3"),
    "Qwen/Qwen3-8B-Base": ("qwen3", "qwen-3"),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", "qwen-3-instruct"),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": ("qwen3", "qwen-3"),
    "google/gemma-2b-it": ("gemma", "gemma"),
    "google/gemma-1.1-7b-it": ("gemma", "gemma"),
    "google/codegemma-7b-it": ("gemma", "gemma"),
    "google/gemma-2-2b-it": ("gemma2", "gemma"),
    "google/gemma-2-27b": ("gemma2", "gemma"),
    "google/gemma-3-270m-it": ("gemma3", "gemma-3"),
    "google/gemma-3-1b-pt": ("gemma3", "gemma-3"),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", "phi-3"),
    "microsoft/Phi-3-medium-128k-instruct": ("phi3", "phi-3"),
    "microsoft/Phi-3.5-mini-instruct": ("phi3", "phi-3"),
    "microsoft/phi-4": ("phi3", "phi-4"),
    "microsoft/Phi-4-reasoning-plus": ("phi3", "phi-4"),
    "microsoft/Phi-4-mini-instruct": ("phi3", "phi-4-mini"),
    "ibm-granite/granite-3.0-8b-base": ("granite", "granite"),
    "ibm-granite/granite-3.3-2b-instruct": ("granite", "granite"),
    "allenai/OLMo-2-1124-7B-Instruct": ("olmo2", "olmo-2"),
    "allenai/OLMo-2-0425-1B": ("olmo2", "olmo-2"),
    "CohereForAI/c4ai-command-r-v01": ("cohere", "command-r"),
    "CohereLabs/c4ai-command-r-plus-08-2024": ("cohere", "command-r"),
    "CohereForAI/aya-23-8B": ("cohere", "command-r"),
    "CohereLabs/c4ai-command-r7b-12-2024": ("cohere2", "command-r7b"),
    "CohereLabs/c4ai-command-a-03-2025": ("cohere2", "command-r7b"),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", "smollm-3"),
    "THUDM/GLM-4-9B-0414": ("glm4", "glm-4"),
    "zai-org/GLM-Z1-32B-0414": ("glm4", "glm-4"),
}

# models of other architectures whose names are near
OTHERS = [
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
    "mistralai/Mixtral-8x7B-v0.1",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "mistralai/Ministral-3-8B-Instruct-2512",
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen2.5-Omni-7B",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "Qwen/Qwen2-57B-A14B-Instruct",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-235B-A22B",
    "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "google/gemma-3-4b-it",
    "google/gemma-3n-E2B-it",
    "microsoft/phi-2",
    "microsoft/Phi-3.5-MoE-instruct",
    "microsoft/Phi-3-small-8k-instruct",
    "microsoft/Phi-3-vision-128k-instruct",
    "microsoft/Phi-4-multimodal-instruct",
    "microsoft/Phi-4-mini-flash-reasoning",
    "ibm-granite/granite-3.1-3b-a800m-instruct",
    "ibm-granite/granite-4.0-h-tiny",
    "ibm-granite/granite-20b-code-base",
    "allenai/OLMo-7B-hf",
    "allenai/Olmo-3-7B-Instruct",
    "CohereLabs/aya-vision-8b",
    "CohereLabs/command-a-vision-07-2025",
    "THUDM/glm-4-9b-chat-hf",
    "zai-org/GLM-4.5-Air",
    "openai-community/gpt2",
]


@pytest.fixture
def clean(monkeypatch):
    """Forget what a test registers."""
    monkeypatch.setattr(registry, "_registered", ())


@pytest.mark.parametrize("name", IDS)
def test_model_ids(name):
    spec = resolve(name)
    assert (spec.name, spec.chat_format) == IDS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_not_claimed(name):
    assert find(name) is None


def test_case_and_organisation_do_not_matter():
    for name in ("LLAMA-3.1-8b", "someone/llama-3.1-8B-my-finetune", "Llama-3.1-8B/"):
        assert resolve(name).name == "llama"


def test_the_more_specific_pattern_wins():
    broad = evolve(MINE, patterns=("Llama*",))
    narrow = evolve(MINE, patterns=("meta-llama/Llama-3.1-8B*",))
    assert resolve("meta-llama/Llama-3.1-8B", extra=[broad]).name == "llama"
    assert resolve("meta-llama/Llama-3.1-8B", extra=[narrow]).name == "mine"
    assert resolve("other/Llama-3.1-8B", extra=[narrow]).name == "llama"
    same = evolve(MINE, patterns=("Llama-3*",))
    assert resolve("meta-llama/Llama-3.1-8B", extra=[same]).name == "mine"


def test_no_two_families_claim_one_name_equally():
    for name in IDS:
        hits = [(registry._rank(hit), spec.name) for spec in specs() for hit in registry._hits(spec, name)]
        best = {owner for rank, owner in hits if rank == max(hits)[0]}
        assert len(best) == 1, name


def test_names_types_and_configs():
    assert resolve("gemma3").name == resolve("gemma3_text").name == "gemma3"
    assert resolve({"model_type": "qwen2"}).name == "qwen2"
    assert resolve(SimpleNamespace(model_type="olmo2")).name == "olmo2"
    assert resolve({"model_type": "llama"}).chat_format is None
    named = {"model_type": "llama", "_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}
    assert resolve(named).chat_format == "zephyr"
    # the model type decides, whatever the name says
    assert resolve({"model_type": "mistral", "_name_or_path": "meta-llama/Llama-3.1-8B"}).name == "mistral"


def test_transformers_config():
    from transformers import AutoConfig

    for spec in specs():
        assert resolve(AutoConfig.for_model(spec.model_types[0])) == spec


def folder(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_folders(tmp_path):
    base = folder(tmp_path / "TinyLlama-mine", config={"model_type": "llama"})
    found = match(base)
    assert (found.spec.name, found.spec.chat_format) == ("llama", "zephyr")
    assert "model type 'llama'" in found.by and str(base) in found.by
    assert resolve(str(base)).name == "llama"

    by_name = folder(tmp_path / "a", adapter_config={"base_model_name_or_path": "Qwen/Qwen3-0.6B"})
    assert resolve(by_name).name == "qwen3"
    by_path = folder(tmp_path / "b", adapter_config={"base_model_name_or_path": str(base)})
    assert resolve(by_path).name == "llama"
    beside = folder(tmp_path / "c", adapter_config={"base_model_name_or_path": "../TinyLlama-mine"})
    assert "the base model of" in match(beside).by


def test_a_local_folder_goes_before_a_pattern_and_a_spec_name_before_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "meta-llama" / "Llama-3.1-8B", config={"model_type": "qwen3"})
    folder(tmp_path / "gemma", config={"model_type": "qwen3"})
    assert resolve("meta-llama/Llama-3.1-8B").name == "qwen3"
    assert resolve("gemma").name == "gemma"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "a config.json or an adapter_config.json"),
        ({"config": "{"}, "cannot be read as JSON"),
        ({"config": "[]"}, "a JSON object"),
        ({"config": {}}, "model_type"),
        ({"adapter_config": {}}, "base_model_name_or_path"),
        ({"adapter_config": {"base_model_name_or_path": "."}}, "not this adapter itself"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    path = folder(tmp_path / "m", **files)
    with pytest.raises(SpecError, match=message) as caught:
        resolve(path)
    assert str(path) in str(caught.value) or "config: model_type" in str(caught.value)


def test_unknown_targets_say_what_is_near_and_that_training_works():
    with pytest.raises(SpecError) as caught:
        resolve("mistrl")
    text = str(caught.value)
    assert "'mistrl'" in text and "'mistral'" in text and "unrewritten" in text and "smollm3" in text
    with pytest.raises(SpecError, match="'gpt2'"):
        resolve({"model_type": "gpt2"})
    with pytest.raises(SpecError, match="'gpt2'"):
        resolve(SimpleNamespace(model_type="gpt2"))
    assert find({"model_type": "gpt2"}) is None


@pytest.mark.parametrize("target", [None, 3, {}, {"model_type": 3}, SimpleNamespace(), []])
def test_targets_that_cannot_be_looked_up(target):
    with pytest.raises(SpecError, match="model_type"):
        resolve(target)


def test_register(clean):
    before = specs()
    registered = register(MINE)
    assert registered == MINE and registered.source == "register"
    assert resolve("someone/Mine-7B") == resolve({"model_type": "mine_type"}) == MINE
    assert specs() == (*before, MINE)


def test_register_refuses_what_is_taken(clean):
    register(MINE)
    with pytest.raises(SpecError, match=r"name 'mine'.*'mine' has it already.*replace=True"):
        register(evolve(MINE, model_types=("other",)))
    with pytest.raises(SpecError, match=r"spec 'mine2'.*model type 'llama'.*'llama' has it already"):
        register(evolve(MINE, name="mine2", model_types=("llama",)))
    assert len(specs()) == 15


def test_register_in_place_of_another(clean):
    mine = register(evolve(MINE, model_types=("llama",)), replace=True)
    assert resolve({"model_type": "llama"}) == mine
    assert "llama" not in [spec.name for spec in specs()] and len(specs()) == 14
    assert len({id(spec) for spec in specs()}) == 14


def test_register_checks_the_record(clean):
    with pytest.raises(SpecError) as caught:
        register(ModelSpec("mine", (), ()))
    assert len(caught.value.problems) == 2
    assert len(specs()) == 14


def plug_in(tmp_path, entry, module="", **data):
    """Make an installed distribution that offers specs, and return the environment that sees it."""
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fastft.specs]\nmine = {entry}\n")
    (tmp_path / "plugin_specs.py").write_text(module)
    for name, text in data.items():
        (tmp_path / f"{name}.toml").write_text(text)
    source = Path(registry.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(source)])}


def ask(env, code):
    code = "from fastft.registry.resolve import resolve, specs\nfrom fastft.errors import SpecError\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


SPEC_MODULE = """
from fastft.registry.spec import ModelSpec
one = ModelSpec("mine", ("mine_type",), ("MineDecoderLayer",), patterns=("Mine-*",))
two = ModelSpec("second", ("second_type",), ("SecondDecoderLayer",))
both = [one, two]
taken = ModelSpec("llama", ("mine_type",), ("MineDecoderLayer",))
wrong = ModelSpec("mine", (), ())
nothing = 3
import pathlib
path = pathlib.Path(__file__).parent / "data.toml"
"""
DATA = 'name = "mine"\nmodel_types = ["mine_type"]\nlayer_classes = ["MineDecoderLayer"]\n'


@pytest.mark.parametrize(
    ("entry", "names"),
    [("plugin_specs:one", ["mine"]), ("plugin_specs:both", ["mine", "second"]), ("plugin_specs:path", ["mine"])],
)
def test_entry_points(tmp_path, entry, names):
    env = plug_in(tmp_path, entry, SPEC_MODULE, data=DATA)
    told = ask(env, "print([s.name for s in specs()][14:], resolve('mine_type').source)")
    assert told.startswith(str(names))
    assert ("data.toml" if entry.endswith("path") else f"entry point mine = {entry}") in told


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("plugin_specs:taken", "'llama' has it already"),
        ("plugin_specs:wrong", "mine.model_types"),
        ("plugin_specs:nothing", "an iterable of them"),
        ("plugin_specs:none", "cannot be loaded"),
        ("no_such_module:one", "Repair or uninstall"),
    ],
)
def test_bad_entry_points(tmp_path, entry, message):
    env = plug_in(tmp_path, entry, SPEC_MODULE)
    told = ask(env, "try:\n    specs()\nexcept SpecError as error:\n    print('told:', error)")
    assert told.startswith("told:") and message in told
