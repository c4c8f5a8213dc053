"""What is handed to training functions and trainers is checked by kind, before anything is read, moved or written."""

import inspect

import pytest
from transformers import TrainerCallback

import fastft
from fastft.errors import DataError, UsageError
from fastft.train.arguments import ALONE

PAIR = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
ROWS = {"sft": [{"prompt": "w1", "completion": "w2"}], "preference": [PAIR], "grpo": ["w1"]}
CONFIGS = {"sft": "SFTConfig", "preference": "DPOConfig", "grpo": "GRPOConfig"}
EACH = pytest.mark.parametrize("name", ROWS)


@pytest.fixture
def told(build_model, tokenizer, tmp_path, monkeypatch):
    """Return the lines of the error that a function raises for wrong arguments; nothing may have been written."""
    monkeypatch.chdir(tmp_path)

    def call(name, *, error=UsageError, rows=None, swapped=False, **options):
        model = build_model()
        pair = (tokenizer, model) if swapped else (model, tokenizer)
        given = {"rewards": [len]} if name == "grpo" else {}
        with pytest.raises(error) as caught:
            getattr(fastft, name)(*pair, ROWS[name] if rows is None else rows, **given, **options)
        assert not list(tmp_path.iterdir())
        return str(caught.value).splitlines()

    return call


@EACH
def test_a_config_that_is_none(name, told):
    config = CONFIGS[name]
    assert told(name, config={"max_steps": 1}) == [
        f"{name} config: expected a fastft.{config}, got {{'max_steps': 1}}. Pass its entries as options, "
        f"{name}(..., **config), or make one: fastft.{config}(**config)."
    ]
    assert told(name, config={"max_steps": 1}, steps=1) == told(name, config={"max_steps": 1})
    other = fastft.KTOConfig("other", use_cpu=True)
    assert told(name, config=other) == [
        f"{name} config: expected a fastft.{config}, got 'KTOConfig'. Make one: fastft.{config}(...)."
    ]


@EACH
def test_callbacks_that_are_none(name, told):
    class Own(TrainerCallback):
        def __repr__(self):
            return "<Own>"

    one = "a transformers.TrainerCallback"
    remedy = "Make a class of it that inherits from TrainerCallback, with the method that is meant: on_log, say."
    assert told(name, callbacks=[Own(), Own, print, 5]) == [
        f"{name} callbacks[2]: expected {one}, got <built-in function print>",
        f"{name} callbacks[3]: expected {one}, got 5",
        f"For these 2: {remedy}",
    ]
    assert told(name, callbacks=Own()) == [
        f"{name} callbacks: expected a list, each {one}, got <Own>. Put it into a list: callbacks=[it]."
    ]
    (line,) = told(name, callbacks=(one for one in [Own()]))  # which could be gone through once
    assert line.startswith(f"{name} callbacks: expected a list, each {one}, got '<generator object")
    assert told(name, callbacks=5) == [f"{name} callbacks: expected a list, each {one}, got 5"]


@EACH
def test_no_folder(name, told, tmp_path):
    for folder in ("", None, 5):
        assert told(name, output_dir=folder) == [
            f"{name} output_dir: expected the path of a folder, got {folder!r}. Name one, or leave it out for 'run'."
        ]
    with pytest.raises(UsageError, match=f"^{CONFIGS[name]} output_dir: expected the path of a folder, got ''"):
        getattr(fastft, CONFIGS[name])("", use_cpu=True)


@EACH
def test_noise_below_zero(name, told):
    (line,) = told(name, neftune_noise_alpha=-1)
    assert (
        line
        == f"{name} neftune_noise_alpha: expected a finite number of at least 0, got -1. Left out, no noise is added."
    )


@EACH
def test_several_mistakes_are_told_together(name, told):
    lines = told(name, swapped=True, callbacks=5, output_dir="")
    assert [line.split(":")[0] for line in lines] == ["model", "tokenizer", f"{name} output_dir", f"{name} callbacks"]


def test_metrics_and_references_that_are_none(told):
    assert told("sft", compute_metrics=5, eval=ROWS["sft"]) == [
        "sft compute_metrics: expected a function that takes a transformers.EvalPrediction and returns a dict, or "
        "None, got 5. Pass the function itself."
    ]
    (line,) = told("preference", ref_model="/nope")
    loads = "fastft.load('/nope') loads a model and its tokenizer."
    assert line == f"preference ref_model: expected a model, got '/nope'. {loads}"
    (line,) = told("preference", ref_model=5)
    leave = "Leave it out, and the reference is the model as it is now."
    assert line == f"preference ref_model: expected a model, got 'int'. {leave}"
    (line,) = told("preference", loss=["dpo"])
    assert line == "preference loss: expected one of dpo, kto, orpo, cpo, simpo, got ['dpo']. did you mean 'dpo'?"


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "ORPO", "CPO", "GRPO"])
def test_a_trainer_refuses_the_same(method, build_model, tokenizer, tmp_path):
    folder = tmp_path / "run"
    args = getattr(fastft, f"{method}Config")(str(folder), use_cpu=True)
    more = {"reward_funcs": [len]} if method == "GRPO" else {}
    rows = ROWS["grpo" if more else "sft" if method == "SFT" else "preference"]
    trainer = getattr(fastft, f"{method}Trainer")

    def lines(**options):
        with pytest.raises(UsageError) as caught:
            trainer(args=args, train_dataset=rows, compile=False, **{"processing_class": tokenizer, **more, **options})
        assert not folder.exists()
        return [line.partition(":")[0] for line in str(caught.value).splitlines()]

    model = build_model()
    assert lines(model=model, callbacks=[print]) == [f"{method}Trainer callbacks[0]"]
    assert lines(model=tokenizer, processing_class=model) == ["model", "tokenizer"]
    if method in ("DPO", "KTO"):
        assert lines(model=model, ref_model="/nope") == [f"{method}Trainer ref_model"]


@pytest.mark.parametrize("label", ["true", "good", None, 2, 1.5])
@pytest.mark.parametrize("alone", [True, False])
def test_a_verdict_that_is_none_is_told_with_its_row(label, alone, told, build_model, tokenizer, tmp_path):
    row = {"prompt": "w1", "completion": "w2"}
    rows = [{**row, "label": label}] if alone else [{**row, "label": True}, {**row, "label": label}]
    remedy = "True where the completion is a good one, False where it is not; without quotes."
    said = f"row {len(rows) - 1}, label: expected True or False, got {label!r}. {remedy}"
    assert told("preference", rows=rows, loss="kto", error=DataError) == [f"train {said}"]
    with pytest.raises(DataError) as caught:
        args = fastft.KTOConfig(str(tmp_path), use_cpu=True)
        fastft.KTOTrainer(build_model(), args=args, train_dataset=rows, processing_class=tokenizer, compile=False)
    assert str(caught.value) == f"train {said}"


def test_a_verdict_in_a_file_and_in_a_table(told, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "verdicts.jsonl"
    path.write_text(
        '{"prompt": "w1", "completion": "w2", "label": 1}\n\n{"prompt": "w1", "completion": "w2", "label": "0"}\n'
    )
    (line,) = told("preference", rows=path, loss="kto", error=DataError)
    assert line.startswith(f"{path}, line 3, label: expected True or False, got '0'.")
    from datasets import Dataset

    table = Dataset.from_dict({"prompt": ["w1"] * 2, "completion": ["w2"] * 2, "label": ["true", "false"]})
    lines = told("preference", rows=table, loss="kto", error=DataError)
    assert [line.partition(":")[0] for line in lines] == ["train row 0, label", "train row 1, label", "For these 2"]


def test_what_belongs_to_another_loss_or_function(told):
    def line(name="preference", **options):
        (only,) = told(name, **options)
        return only.removeprefix(f"{name}: unknown argument ")

    assert line(simpo_gamma=1) == "'simpo_gamma'; it belongs to loss='simpo'"
    assert line(cpo_alpha=1) == "'cpo_alpha'; it belongs to loss='cpo' and loss='simpo'"
    assert line(desirable_weight=1) == "'desirable_weight'; it belongs to loss='kto'"
    assert line(loss="kto", use_weighting=True) == "'use_weighting'; it belongs to loss='dpo'"
    assert line(train_on="all") == "'train_on'; it belongs to fastft.sft(train_on=...)"
    assert line("sft", loss="dpo") == "'loss'; it belongs to fastft.preference(loss=...)"
    assert line("sft", engine="vllm") == "'engine'; it belongs to fastft.grpo(engine=...)"
    assert line("grpo", overlong="refuse") == "'overlong'; it belongs to fastft.sft(overlong=...)"
    assert line("sft", overlng="refuse") == "'overlng'; did you mean 'overlong'?"
    assert line(losss="kto") == "'losss'; did you mean 'loss'?"
    for argument, function in ALONE.items():  # what is said is so
        has = {name for name in ROWS if argument in inspect.signature(getattr(fastft, name)).parameters}
        assert has == {function}, argument
