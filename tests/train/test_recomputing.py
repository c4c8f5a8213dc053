"""Recomputing layers: asked for by either of transformers' names, done by one of the memory plan and transformers."""

import dataclasses
import warnings

import pytest
import trl

from fastft.graph.compile import compile as compile_layers
from fastft.train import base, recomputing
from fastft.train.grpo.config import GRPOConfig
from fastft.train.preference.reference_free import CPOConfig, ORPOConfig
from fastft.train.preference.referenced import DPOConfig, KTOConfig
from fastft.train.recomputing import is_asked
from fastft.train.settings import evolved
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


def recomputes(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_transformers_recomputes_no_compiled_layer(build_model, tokenizer, dataset, settings):
    """By neither name of it: the memory plan recomputes, and would be recomputed."""
    for name in recomputing.fields(SFTConfig, True):
        args = SFTConfig(**{**settings, "max_steps": 1}, **{name: True})
        model = compile_layers(build_model(), backend="aot_eager", plan="min")
        made = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        made.train()
        assert not recomputes(model) and not is_asked(made.args) and is_asked(args)


@pytest.mark.parametrize("older", [{}, {"max_seq_length": 48}], ids=["alone", "with an older argument"])
def test_trls_own_default_of_recomputing_is_not_taken_over(older, build_model, tokenizer, dataset, settings, capsys):
    stock = trl.SFTConfig(**settings)
    made = SFTTrainer(build_model(), stock, compile=False, train_dataset=dataset, processing_class=tokenizer, **older)
    assert is_asked(stock) and not is_asked(made.args)
    assert capsys.readouterr().out.count("gradient checkpointing is left to the memory plan") == 1
    assert made.args.max_length == (48 if older else 64)


@pytest.mark.parametrize("config", [SFTConfig, GRPOConfig, DPOConfig, KTOConfig, ORPOConfig, CPOConfig])
def test_a_config_warns_of_no_older_name(config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = [config(str(tmp_path), use_cpu=True, gradient_checkpointing=value) for value in (False, True)]
        again = evolved(config, made[1], {})
    assert [is_asked(args) for args in (*made, again)] == [False, True, True]


@pytest.mark.parametrize("name", recomputing.fields(SFTConfig, True))
@pytest.mark.parametrize("first", [False, True])
def test_either_name_changed_later_is_taken(name, first, tmp_path, capsys):
    """By dataclasses.replace, or set on the config and then copied; what cannot be told apart is said."""
    made = SFTConfig(str(tmp_path), use_cpu=True, **{name: first})
    assert is_asked(made) is first and capsys.readouterr().out == ""
    set_later = dataclasses.replace(made)
    setattr(set_later, name, True)
    for changed in (dataclasses.replace(made, **{name: True}), evolved(SFTConfig, set_later, {"seed": 3})):
        assert all(getattr(changed, each) is True for each in recomputing.fields(changed, True))
    two = len(recomputing.fields(SFTConfig, True)) == 2
    assert capsys.readouterr().out.count("which are one thing: it is on") == (2 if two and not first else 0)


@pytest.mark.parametrize("name", recomputing.fields(SFTConfig, True))
def test_names_that_disagree_are_on_and_told(name, tmp_path, capsys):
    if len(recomputing.fields(SFTConfig, True)) < 2:
        pytest.skip("transformers has one name")
    said = {each: each != name for each in recomputing.NAMES}
    made = SFTConfig(str(tmp_path), use_cpu=True, **said)
    assert all(getattr(made, each) is True for each in recomputing.NAMES)
    assert f"{name}=False" in capsys.readouterr().out
    setattr(made, name, False)  # and on the way to a trainer
    assert base.take_recompute(made, compile=True) and not is_asked(made)
    assert f"{name}=False" in capsys.readouterr().out
