"""Every public function that takes a model, a tokenizer or a folder says which of them is none, and writes nothing."""

import pytest

import fastft
from fastft import given
from fastft.demo import MODEL_FOLDER
from fastft.errors import UsageError

PAIR = "fastft.load returns the pair (model, tokenizer); pass each in its place."


@pytest.fixture(scope="module")
def loaded():
    return fastft.load(MODEL_FOLDER, max_length=128)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Return the lines of the error of a call."""
    monkeypatch.chdir(tmp_path)

    def call(function, *args, **kwargs):
        with pytest.raises(UsageError) as caught:
            function(*args, **kwargs)
        assert not list(tmp_path.iterdir())
        return str(caught.value).splitlines()

    return call


def test_no_model(loaded, told):
    tokenizer = loaded[1]
    kind = type(tokenizer).__name__
    for function, more in (
        (fastft.add_lora, ()),
        (fastft.compile, ()),
        (fastft.report, ()),
        (fastft.verify, ([],)),
        (fastft.generate, (tokenizer, "hi")),
        (fastft.add_tokens, (tokenizer, ["a"])),
    ):
        assert told(function, tokenizer, *more) == [f"model: expected a model, got {kind!r}. {PAIR}"]
        assert told(function, loaded, *more) == [f"model: expected a model, got 'tuple'. {PAIR}"]
        loads = "fastft.load('x') loads a model and its tokenizer."
        assert told(function, "x", *more) == [f"model: expected a model, got 'x'. {loads}"]
    owner = fastft.FastLanguageModel.get_peft_model
    assert told(owner, tokenizer) == [f"get_peft_model model: expected a model, got {kind!r}. {PAIR}"]


def test_model_and_tokenizer_swapped(loaded, told):
    model, tokenizer = loaded
    for function, more in ((fastft.generate, "hi"), (fastft.add_tokens, ["a"])):
        assert told(function, tokenizer, model, more) == [
            f"model: expected a model, got {type(tokenizer).__name__!r}. {PAIR}",
            f"tokenizer: expected a tokenizer, got {type(model).__name__!r}",
        ]
        assert told(function, model, None, more) == ["tokenizer: expected a tokenizer, got 'NoneType'"]


def test_neither_a_model_nor_a_folder(loaded, told):
    model, tokenizer = loaded
    expected, kind = "a model, or the path of a folder", type(tokenizer).__name__
    for function, args, name in (
        (fastft.merge, ("mm",), "model"),
        (fastft.save_adapter, ("mm",), "model"),
        (fastft.verify_export, (), "model"),
        (fastft.export_gguf, (), "model_or_folder"),
        (fastft.export_lora_gguf, ("a.gguf",), "model_or_folder"),
    ):
        assert told(function, 5, *args) == [f"{name}: expected {expected}, got 'int'. {PAIR}"]
        assert told(function, tokenizer, *args) == [f"{name}: expected {expected}, got {kind!r}. {PAIR}"]
        assert told(function, "", *args) == [f"{name}: expected {expected}, got ''. {PAIR}"]
    for function, args in ((fastft.merge, ("mm",)), (fastft.save_adapter, ("mm",)), (fastft.verify_export, ())):
        (line,) = told(function, model, *args, tokenizer=5)
        assert line == "tokenizer: expected a tokenizer, got 'int'"
    assert told(fastft.export_gguf, model, 5) == ["tokenizer: expected a tokenizer, got 'int'"]
    for folder in (None, "", 5):
        line = f"folder: expected the path of a folder, got {folder!r}"
        assert told(fastft.merge, model, folder) == [line]
        assert told(fastft.save_adapter, model, folder) == [line]
        assert told(fastft.export_gguf, model, tokenizer, folder) == [line]
    assert told(fastft.export_lora_gguf, model, None)[0] == "path: expected the path of a .gguf file, got None"


def test_what_a_tokenizer_may_be_taken_for():
    assert str(given.tokenizer_problem("some/name")).endswith(
        "got 'some/name'. transformers.AutoTokenizer.from_pretrained('some/name') loads it."
    )
    holder = type("Processor", (), {"tokenizer": object()})()
    assert (
        str(given.tokenizer_problem(holder)) == "tokenizer: expected a tokenizer, got 'Processor'. Pass its .tokenizer."
    )
