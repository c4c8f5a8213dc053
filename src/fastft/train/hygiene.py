"""What trainers change on a model while they are built or while they run, put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.neftune import deactivate_neftune

from fastft.state import base_model

# Attributes that TRL and accelerate set on the instance to wrap the forward.
FORWARDS = ("forward", "_original_forward")


@contextmanager
def unpatched(model: Any) -> Iterator[None]:
    """Give the model its own forward back when the block ends, whatever was put in its place."""
    parts = {id(part): part for part in (model, base_model(model))}.values()
    before = [(part, {name: part.__dict__[name] for name in FORWARDS if name in part.__dict__}) for part in parts]
    try:
        yield
    finally:
        for part, own in before:
            for name in FORWARDS:
                part.__dict__.pop(name, None)
            part.__dict__.update(own)


@contextmanager
def noise_ended(trainer: Any) -> Iterator[None]:
    """Take NEFTune's noise off the embeddings when the block ends; transformers does it for whole runs alone."""
    try:
        yield
    finally:
        handle = getattr(trainer, "neftune_hook_handle", None)
        if handle is not None:
            deactivate_neftune(trainer.model, handle, trainer.accelerator)


@contextmanager
def own_dtypes(model: Any) -> Iterator[None]:
    """Keep the trained parameters as they are: TRL rounds the adapters of a quantised model to bfloat16."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.data is not data:
                parameter.data = data


@contextmanager
def own_adapters(model: Any) -> Iterator[None]:
    """Take away adapters that are put on an adapted model meanwhile: TRL copies one for the reference of a loss."""
    before = set(getattr(model, "peft_config", ()))
    try:
        yield
    finally:
        for name in [name for name in getattr(model, "peft_config", ()) if before and name not in before]:
            model.delete_adapter(name)


@contextmanager
def head_out_of_sight(model: Any) -> Iterator[None]:
    """Let TRL take a model with an adapter on its head, which its own loss could not train, and ours can."""
    if not hasattr(model, "peft_config"):
        yield
        return
    model.__dict__["get_output_embeddings"] = lambda: None
    try:
        yield
    finally:
        del model.__dict__["get_output_embeddings"]
