"""A tiny Llama in fp32 on the CPU, a word tokenizer with a chat template, and short random rows."""

from pathlib import Path

import pytest
import torch

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ message['content'] }} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def build_tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"] + [f"w{i}" for i in range(89)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    turns = ["<|user|>", "<|assistant|>", "<|system|>"]
    made = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=turns, **special)
    made.chat_template = template
    return made


def build_model(family="llama", lora=True, seed=0, targets="all-linear", dropout=0.0, modules_to_save=None, **changes):
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(family, **{**sizes, **changes})
    # SDPA has no soft cap: some versions of transformers refuse it for Gemma 2, others leave the cap out.
    config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if not lora:
        return model
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        lora_dropout=dropout,
        modules_to_save=modules_to_save,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build_rows(count=16, seed=0, low=4, high=24):
    """Rows of unequal length; of each, about the first third is not learnt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(low, high, (1,), generator=generator))
        ids = torch.randint(7, 96, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (size // 3) + ids[size // 3 :]})
    return rows


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture(name="build_model")
def build_model_fixture():
    return build_model


@pytest.fixture(name="build_rows")
def build_rows_fixture():
    return build_rows


@pytest.fixture(name="build_tokenizer")
def build_tokenizer_fixture():
    return build_tokenizer


@pytest.fixture
def dataset(build_rows):
    from datasets import Dataset

    return Dataset.from_list(build_rows())


@pytest.fixture
def settings(tmp_path):
    """Keyword arguments of a short, quiet run on the CPU in fp32."""
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "linear",
        "max_length": 64,
    }


@pytest.fixture
def run(build_model, tokenizer, dataset, settings):
    """Return the folder of an SFT run of two steps, with a checkpoint of each."""
    from resuming import trainer

    trainer(build_model(), tokenizer, dataset, settings).train()
    return Path(settings["output_dir"])
