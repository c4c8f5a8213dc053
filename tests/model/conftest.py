"""Tiny random models of several families on disk, with a real (small) BPE tokenizer and a chat template."""

import copy
import json
import shutil

import pytest
import torch

TEXT = [
    "The quick brown fox jumps over the lazy dog while the cat sleeps.",
    "A model reads tokens and writes tokens; a tokenizer turns text into numbers.",
    "What is two and two? Two and two are four, and four and four are eight.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 4,
    "pad_token_id": None, "initializer_range": 0.15,
}  # fmt: skip


def make_tokenizer(**changes):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    extra = changes.pop("extra", [])
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL + extra,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT, trainer)
    arguments = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": None, "chat_template": TEMPLATE, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{k: v for k, v in arguments.items() if v is not None})


def make_config(family, **changes):
    import transformers as t

    classes = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config, "gemma3": t.Gemma3TextConfig, "phi3": t.Phi3Config}
    extra = {"head_dim": 16, "sliding_window": 64} if family == "gemma3" else {}
    return classes[family](**{**SIZES, **extra, **changes})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family, tokenizer=True, shard=None, seed=0, **config) -> a fresh folder with a saved random fp32 model."""
    made = {}

    def make(family="llama", tokenizer=True, shard=None, seed=0, tokenizer_changes=None, generation=None, **changes):
        key = json.dumps([family, tokenizer, shard, seed, tokenizer_changes, generation, changes], sort_keys=True)
        if key not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(make_config(family, **changes))
                for name, parameter in model.named_parameters():
                    if "norm" in name or name.endswith("bias"):
                        torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
            for name, value in (generation or {}).items():
                setattr(model.generation_config, name, value)
            model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
            if tokenizer:
                make_tokenizer(**copy.deepcopy(tokenizer_changes or {})).save_pretrained(folder)
            made[key] = folder
        copied = tmp_path_factory.mktemp("copy") / made[key].name
        shutil.copytree(made[key], copied)
        return copied

    return make


@pytest.fixture
def rms():
    """rms(out, ref): root of the mean square error over the root of the mean square of the reference."""

    def error(out, ref):
        ref = ref.double()
        ratio = ((out.double() - ref).norm() / ref.norm()).item()
        return ratio if ratio == ratio else float("inf")

    return error
