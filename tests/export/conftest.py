"""Adapters whose every part does something, and the judge that compares logits."""

import pytest
import torch

import fastft
from fastft.demo import MODEL_FOLDER


def shake(model, scale=0.05, seed=1):
    """Give every trainable number of a model a random nudge, so that no adapter is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter))
    return model.eval()


def logits(model, seed=0, vocabulary=900):
    ids = torch.randint(3, vocabulary, (2, 33), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def relative(truth, value):
    return ((value - truth).norm() / truth.norm()).item()


@pytest.fixture
def adapted():
    """adapted(quant=None, dtype="float32", **lora) -> (model, tokenizer): the demo model with a shaken adapter."""

    def make(quant=None, dtype="float32", scale=0.05, **options):
        model, tokenizer = fastft.load(MODEL_FOLDER, quant=quant, dtype=dtype)
        return shake(fastft.add_lora(model, r=4, **options), scale), tokenizer

    return make


@pytest.fixture
def tools():
    return shake, logits, relative
