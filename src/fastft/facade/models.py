"""The classes under their familiar names."""

from typing import Any, NoReturn

import torch

from fastft.errors import UsageError
from fastft.facade.adapters import check_model, get_peft_model
from fastft.facade.loading import from_pretrained
from fastft.facade.names import plan_for
from fastft.state import base_model, get_state, update_state


class FastLanguageModel:
    """Load, adapt and switch a language model with the names that scripts written for Unsloth use."""

    from_pretrained = staticmethod(from_pretrained)
    get_peft_model = staticmethod(get_peft_model)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Return `model` in training mode, without a key-value cache, its tokenizer padding on the right.

        `use_gradient_checkpointing` changes the memory plan that `fastft.compile` takes; None leaves it.
        """
        check_model("for_training", model)
        plan, problem = plan_for("for_training", use_gradient_checkpointing)
        if problem:
            raise UsageError(problem)
        if plan is not None:
            _change_plan(model, plan)
        return _switch(model, training=True)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Return `model` in eval mode, with a key-value cache, its tokenizer padding on the left."""
        check_model("for_inference", model)
        return _switch(model, training=False)


class FastModel(FastLanguageModel):
    """The same as `FastLanguageModel`."""


class FastVisionModel:
    """Vision models are not supported yet: every method raises `UsageError`."""

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            "FastVisionModel: models that read images are not supported yet; FastLanguageModel and fastft.load take "
            "text models, and transformers with PEFT trains vision models"
        )

    from_pretrained = get_peft_model = for_training = for_inference = _refuse


def is_bfloat16_supported() -> bool:
    """Say whether training may compute in bfloat16: what the GPU says, and yes on a CPU, which has no fp16 training."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else True


def _switch(model: Any, training: bool) -> Any:
    base, tokenizer = base_model(model), get_state(model).tokenizer
    model.train(training)
    base.config.use_cache = not training
    if tokenizer is not None:
        tokenizer.padding_side = "right" if training else "left"
    return model


def _change_plan(model: Any, plan: str) -> None:
    compiled = get_state(model).compiled
    update_state(model, plan=plan)
    if compiled is not None and compiled.layers and compiled.settings.plan != plan:
        print(
            f"fastft: for_training: the model is compiled with the memory plan {compiled.settings.plan!r}; "
            f"fastft.compile(model) compiles it again with {plan!r}."
        )
