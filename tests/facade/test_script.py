"""A script as people have it, run unchanged but for its import lines."""

import pytest
import torch

PROMPT = "### Instruction:\n{}\n\n### Response:\n{}"


def script(folder, trainer_arguments, **more):
    """The whole script; `trainer_arguments` makes the training arguments, `more` goes to from_pretrained."""
    from datasets import Dataset

    from fastft import FastLanguageModel, SFTTrainer

    max_seq_length = 512
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=max_seq_length,
        load_in_4bit=True,
        **more,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    eos_token = tokenizer.eos_token

    def formatting_prompts_func(examples):
        texts = []
        for instruction, output in zip(examples["instruction"], examples["output"], strict=True):
            texts.append(PROMPT.format(instruction, output) + eos_token)
        return {"text": texts}

    numbers = range(10, 34)  # of several lengths, for which the layers are compiled again
    questions = [f"What is {a} + {a + 3}?" + " Say it aloud." * (a % 3) for a in numbers]
    dataset = Dataset.from_dict({"instruction": questions, "output": [f"Ahoy! {2 * a + 3}" for a in numbers]})
    dataset = dataset.map(formatting_prompts_func, batched=True)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        dataset_num_proc=2,
        packing=False,
        args=trainer_arguments(),
    )
    trainer_stats = trainer.train()

    FastLanguageModel.for_inference(model)
    inputs = tokenizer([PROMPT.format("What is 12 + 15?", "")], return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=12, use_cache=True)
    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")

    reloaded, tokenizer = FastLanguageModel.from_pretrained(
        model_name="lora_model",
        max_seq_length=max_seq_length,
        load_in_4bit=True,
        **more,
    )
    FastLanguageModel.for_inference(reloaded)
    again = reloaded.generate(**inputs, max_new_tokens=12, use_cache=True)
    with torch.no_grad():
        logits = [asked(**inputs).logits for asked in (model, reloaded)]
    return {
        "trainer": trainer, "stats": trainer_stats, "start": start, "dataset": dataset,
        "outputs": outputs, "again": again, "logits": logits,
    }  # fmt: skip


def transformers_arguments(**more):
    from transformers import TrainingArguments

    return TrainingArguments(**common(), **more)


def our_config(**more):
    from fastft import SFTConfig

    return SFTConfig(**common(), **more)


def common():
    return {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 1,
        "max_steps": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "output_dir": "outputs",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def curve(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if "loss" in row]


def reference(folder, dataset, start):
    """The same training on transformers' and PEFT's own model, uncompiled."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from fastft import SFTConfig, SFTTrainer
    from fastft.model.quantize import keep_weights_unpacked

    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantised)
    keep_weights_unpacked(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name).copy_(value)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = SFTConfig(**common(), dataset_text_field="text", max_length=512)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, compile=False)
    trainer.train()
    return trainer


def test_the_script_runs_unchanged(folder, aot_eager, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import fastft

    made = script(folder, transformers_arguments, dtype=torch.float32)
    plain = reference(folder, made["dataset"], made["start"])
    report = fastft.report(made["trainer"].model)
    assert report.plan == "min" and report.refused() == ()
    graphs = len(report.graphs) - 1  # the first layer and the others; again where lengths turn out to vary
    assert graphs >= 2
    # the norm behind the layers has a graph of its own
    assert report.applied() == {"lora": 7 * graphs, "norm": 2 * graphs + 1, "glu": graphs, "rope": graphs}
    losses = curve(made["trainer"])
    torch.testing.assert_close(losses, curve(plain), rtol=2e-5, atol=0)
    torch.testing.assert_close(curve(made["trainer"], "grad_norm"), curve(plain, "grad_norm"), rtol=2e-4, atol=0)
    assert 5.5 < losses[0] < 7.5 and losses[-1] < losses[0] - 0.5
    assert made["stats"].metrics["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    ours, again = made["logits"]
    assert torch.equal(ours, again) and torch.equal(made["outputs"], made["again"])
    plain.model.eval()
    text = made["trainer"].processing_class(PROMPT.format("What is 12 + 15?", ""), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours, plain.model(**text).logits, rtol=0, atol=2e-3 * ours.abs().max().item())
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if line.startswith("fastft: ")]
    moved = [line for line in said if "was moved there" in line]
    assert len(moved) == 4 and all("SFTTrainer(" in line for line in moved)
    learnt = "fastft: train: plain text (column 'text'), 24 rows; learnt: every token."
    assert said.count(learnt) == 2  # of the script and of the reference


def test_the_script_with_a_config_in_16_bits(folder, aot_eager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from fastft import is_bfloat16_supported, report

    able = is_bfloat16_supported()
    made = script(folder, lambda: our_config(bf16=able, fp16=not able, max_length=512), dtype=None)
    assert report(made["trainer"].model).refused() == ()
    losses = curve(made["trainer"])
    assert 5.5 < losses[0] < 7.5 and losses[-1] < losses[0] - 0.5
    assert torch.equal(*made["logits"]) and torch.equal(made["outputs"], made["again"])
