"""Dropout that is a module's, and that of attention, which is a number."""

import pytest

from fastft.data.collate import collate
from fastft.train import dropping, step
from fastft.train.verify import verify


def test_dropout_of_modules_and_of_attention_is_found(build_model):
    plain, module, number = build_model(), build_model(dropout=0.1), build_model(attention_dropout=0.3)
    assert not any(dropping.first_on(model.eval()) for model in (plain, module, number))
    assert [dropping.first_on(model.train()) for model in (plain, module, number)] == [
        "",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_dropout.default",
        "base_model.model.model.layers.0.self_attn",
    ]


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"attention_dropout": 0.5}], ids=["module", "number"])
def test_nothing_is_dropped_while_it_is_off(changes, build_model, build_rows):
    model, batch = build_model(**changes).train(), collate(build_rows(3))

    def losses():
        return {step.loss(model, batch).item() for _ in range(3)}

    with pytest.raises(KeyError), dropping.off(model):
        assert len(losses()) == 1 and dropping.first_on(model) == ""
        raise KeyError
    model.train()
    assert len(losses()) == 3 and dropping.first_on(model)


def test_a_wrong_loss_is_found_beside_dropout_in_attention(build_model, build_rows, monkeypatch):
    """As noise it would have been taken for rounding."""
    own, model = step.loss, build_model(attention_dropout=0.3)
    assert verify(model, [collate(build_rows(3))]).ok
    monkeypatch.setattr(step, "loss", lambda model, batch: own(model, batch) * 1.002)
    found = verify(model, [collate(build_rows(3))])
    assert not found.ok and max(found.budgets) < 1e-5
    shares = {module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")}
    assert shares == {0.3}


def test_a_step_with_dropout_in_attention_is_not_recorded(build_model):
    from fastft.train.cuda_graphs import _random

    told = "every step draws its own random numbers"
    assert _random(build_model(attention_dropout=0.3).train()).endswith(told) and not _random(build_model().train())
