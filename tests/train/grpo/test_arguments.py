"""Arguments of GRPO that are taken over from elsewhere, and prompts that are left out."""

import datasets
from grpo_runs import PROMPTS, GivenRollouts, even

import fastft
from fastft.rollout.choose import attach_engine
from fastft.train.grpo.config import GRPOConfig, make_config
from fastft.train.grpo.trainer import GRPOTrainer


def test_longer_prompts_are_left_out_and_told(trainer, capsys):
    made = trainer(GivenRollouts(), prompts=["w1 w2 w3 w4 w5", *PROMPTS], max_prompt_length=3)
    assert len(made.train_dataset) == len(PROMPTS)
    assert "1 of 9 prompts are longer than max_prompt_length=3: left out." in capsys.readouterr().out


def test_longer_prompts_are_left_out_of_every_evaluation_set(config, build_model, tokenizer, capsys):
    sets = {"one": PROMPTS[:2], "two": ["w1 w2 w3 w4 w5", *PROMPTS[2:5]]}
    made = GRPOTrainer(
        build_model(), even, GRPOConfig(**config, max_prompt_length=3), processing_class=tokenizer, compile=False,
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS], engine=GivenRollouts(),
        eval_dataset={name: [{"prompt": prompt} for prompt in texts] for name, texts in sets.items()},
    )  # fmt: skip
    assert {name: len(rows) for name, rows in made.eval_dataset.items()} == {"one": 2, "two": 3}
    assert "two: 1 of 4 prompts are longer than max_prompt_length=3: left out." in capsys.readouterr().out
    metrics = made.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= set(metrics), metrics


def test_older_names_and_fields(config, build_model, tokenizer, capsys):
    class SamplingParams:
        min_p, top_p, top_k, temperature, repetition_penalty, stop = 0.1, 0.9, -1, 1.0, 1.0, ["</s>"]

    args = GRPOConfig(
        **config, vllm_sampling_params=SamplingParams(), unsloth_num_chunks=4, unsloth_grpo_mini_batch=2,
        max_seq_length=20,
    )  # fmt: skip
    made = GRPOTrainer(
        model=build_model(),
        reward_funcs=even,
        args=args,
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        tokenizer=tokenizer,
        compile=False,
        max_completion_length=5,
    )
    assert made.processing_class is tokenizer and made.max_completion_length == 5
    sampling = made.sampling()
    assert (sampling.min_p, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (0.1, 0.9, 0, 5)
    assert made.args.max_prompt_length == 12
    told = capsys.readouterr().out
    for part in (
        "unsloth_num_chunks",
        "unsloth_grpo_mini_batch",
        "top_p=0.9, min_p=0.1",
        "stop=",
        "max_completion_length",
    ):
        assert part in told


def test_names_that_scripts_import(capsys):
    fastft.PatchFastRL("GRPO", fastft.FastLanguageModel)
    assert "import the trainer: from fastft import GRPOTrainer" in capsys.readouterr().out
    assert fastft.vLLMSamplingParams(min_p=0.1) == {"min_p": 0.1}


def test_prompts_to_evaluate_on_are_evaluated_on(config, build_model):

    every = make_config(None, {"eval_steps": 5, "generations": 2}, config["output_dir"], build_model(), evaluated=True)
    assert every.eval_strategy == "steps" and every.eval_steps == 5
    assert make_config(None, {}, config["output_dir"], build_model(), evaluated=True).eval_strategy == "epoch"
    assert make_config(None, {}, config["output_dir"], build_model()).eval_strategy == "no"


def test_a_model_loaded_without_vllm_rolls_out_without_it(config, build_model, tokenizer, capsys):
    model = build_model()
    attach_engine(model, "transformers", {})
    args = GRPOConfig(**{**config, "engine": None}, use_vllm=True)
    rows = datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS])
    made = GRPOTrainer(model, [even], args, train_dataset=rows, processing_class=tokenizer, compile=False)
    assert made.engine.name == "transformers" and "is not given to vLLM here" in capsys.readouterr().out
