"""make_engine: names, options, and what is said when an engine cannot be had."""

import pytest
import tiny
import torch

from fastft.errors import EngineError, UsageError
from fastft.rollout import choose, make_engine
from fastft.rollout.base import Sampling
from fastft.rollout.hf import TransformersEngine


@pytest.fixture(scope="module")
def model():
    return tiny.make("llama", torch.float32, lora=True)


def test_what_vllm_cannot_serve_on_a_gpu():
    """A device that is no CPU stands for one: vLLM's LoRA kernels take 16 bits there."""
    model = tiny.make("llama", torch.float32, lora=True)
    assert choose.vllm_obstacle(model) == ""
    told = "vLLM's LoRA kernels on a GPU compute in 16 bits, and the model in float32"
    assert choose.vllm_obstacle(model.to("meta")) == told
    assert choose.vllm_obstacle(model.to(torch.bfloat16)) == ""


def test_the_weights_are_handed_over(model):
    engine = make_engine("transformers", model, None, max_rows=2)
    assert engine.name == "transformers" and engine.shares_memory
    assert len(engine.generate([[5, 6]], Sampling(3), count=5)[0]) == 5
    assert make_engine(engine, model, None) is engine


def test_wrong_names_and_options_are_told_together(model):
    with pytest.raises(UsageError, match="did you mean 'transformers'"):
        make_engine("transformer", model, None)
    with pytest.raises(UsageError) as error:
        make_engine("transformers", model, None, max_row=3, speed=1)
    assert "did you mean 'max_rows'" in str(error.value) and "speed" in str(error.value)
    with pytest.raises(UsageError, match="none beside an engine"):
        make_engine(TransformersEngine(), model, None, max_rows=3)


def test_without_vllm_the_error_names_what_installs_it(model, monkeypatch):
    monkeypatch.setattr("fastft.rollout.choose.installed", lambda package: False)
    with pytest.raises(EngineError, match=r"pip install 'fastft\[vllm\]'"):
        make_engine("vllm", model, None)


def test_auto_says_what_it_takes(model, capsys):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    assert make_engine("auto", model, None).name == "transformers"
    assert "takes 'transformers'" in capsys.readouterr().out
