"""Arguments of `load` that cannot work are told by their names, before anything is looked for."""

import pytest
import transformers

from fastft.errors import LoadError, UsageError
from fastft.graph.attention import register
from fastft.model.config import attention_problem
from fastft.model.load import load


def test_all_wrong_arguments_are_told_at_once():
    with pytest.raises(UsageError) as caught:
        load("x", quant="4bit", dtype="flot32", max_length=0, full=True, load_in_4bit=True, revison="a", quux=1)
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    for part in (
        "quant: expected None, 'nf4', 'int8' or 'fp8', got '4bit'. did you mean 'nf4'?",
        "did you mean 'float32'?",
        "max_length: expected a positive number",
        "full: expected False together with quant",
        "'load_in_4bit'; here it is quant='nf4'",
        "'revison'; did you mean 'revision'?",
        "'quux'; it takes",
    ):
        assert part in text


@pytest.mark.parametrize("source", [None, "", 5])
def test_no_folder_and_no_name(source):
    with pytest.raises(UsageError) as caught:
        load(source)
    assert str(caught.value) == (
        f"load path_or_id: expected the folder of a model, or its name on the hub, got {source!r}. "
        "Such as 'models/llama' or 'owner/name'."
    )


def test_an_attention_that_there_is_not(tiny):
    register()  # as compiling does
    with pytest.raises(UsageError) as caught:
        load(tiny(), attn_implementation="flash")
    text = str(caught.value)
    assert text.startswith("attn_implementation: expected None or one of eager, flash_attention_2, flash_")
    assert ", sdpa, got 'flash'" in text and "|" not in text and "fastft" not in text
    with pytest.raises(UsageError, match="did you mean 'sdpa'"):
        load("nobody/nothing", attn_implementation="sdpaa")
    with pytest.raises(UsageError, match=r"^attn_implementation: expected None or one of .*got 5"):
        load("nobody/nothing", attn_implementation=5)


@pytest.mark.parametrize("name", [None, "eager", "paged|sdpa", "owner/kernel", {"": "sdpa"}])
def test_an_attention_that_there_may_be(name):
    assert attention_problem(name) is None


def test_an_attention_whose_package_is_missing(tiny, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("the package flash_attn seems to be not installed")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(UsageError) as caught:
        load(tiny(), attn_implementation="flash_attention_2")
    assert str(caught.value) == (
        "attn_implementation: expected None, or one that can be had here, got 'flash_attention_2'. "
        "the package flash_attn seems to be not installed"
    )
    with pytest.raises(LoadError, match="the weights cannot be loaded"):
        load(tiny())
