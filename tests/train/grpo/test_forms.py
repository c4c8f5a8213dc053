"""The form in which rewards see prompts and completions: that of the prompts which were given."""

import pytest
from grpo_runs import PROMPTS, GivenRollouts

import fastft
from fastft.errors import DataError
from fastft.train.grpo.config import GRPOConfig
from fastft.train.grpo.trainer import GRPOTrainer

TURNS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


class Seen:
    """A reward that keeps what it is shown."""

    def __init__(self):
        self.prompts, self.completions, self.names = [], [], set()

    def __call__(self, prompts, completions, **columns):
        self.prompts += prompts
        self.completions += completions
        self.names |= set(columns)
        return [float(len(completion)) for completion in completions]


@pytest.fixture
def run(build_model, tokenizer, config):
    """Run one step on prompts and return what a reward was shown."""

    def run(prompts, **options):
        seen = Seen()
        given = {"generations": 4, "max_new_tokens": 4, "steps": 1, "compile": False, "disable_tqdm": True, **options}
        fastft.grpo(build_model(), tokenizer, prompts, seen, config["output_dir"], engine=GivenRollouts(), **given)
        return seen

    return run


def is_text(values):
    return bool(values) and all(isinstance(value, str) for value in values)


def is_turns(values, role):
    return bool(values) and all([message["role"] for message in value] == [role] for value in values)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("form", ["texts", "rows"])
def test_texts_give_texts(form, chat, run):
    prompts = PROMPTS if form == "texts" else [{"prompt": prompt, "answer": 1} for prompt in PROMPTS]
    seen = run(prompts, chat=chat)
    assert is_text(seen.completions) and is_text(seen.prompts) and set(seen.prompts) <= set(PROMPTS)
    assert ("answer" in seen.names) == (form == "rows") and "completion_ids" in seen.names


def test_conversations_give_messages(run):
    for prompts in (TURNS, [{"prompt": turns} for turns in TURNS]):
        seen = run(prompts)
        assert is_turns(seen.completions, "assistant") and is_turns(seen.prompts, "user")


def test_rewards_of_an_evaluation_see_the_same_form(run):
    seen = run(PROMPTS, eval=PROMPTS[:1], eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    assert is_text(seen.completions) and is_text(seen.prompts) and len(seen.prompts) > 4
    with pytest.raises(
        DataError, match="expected texts in both, or conversations in both, got 'prompts: texts, eval: co"
    ):
        run(PROMPTS, eval=TURNS)
    with pytest.raises(DataError, match="got 'prompts: conversations, eval: texts'"):
        run(TURNS, eval=PROMPTS)


def test_the_trainer_keeps_to_the_form_of_its_rows(build_model, tokenizer, config):
    for rows, text in ((PROMPTS, True), (TURNS, False)):
        seen = Seen()
        data = [{"prompt": prompt} for prompt in rows]
        args = GRPOConfig(**{**config, "max_steps": 1})
        options = {"train_dataset": data, "processing_class": tokenizer, "engine": GivenRollouts(), "compile": False}
        GRPOTrainer(build_model(), seen, args, **options).train()
        assert is_text(seen.completions) if text else is_turns(seen.completions, "assistant")
