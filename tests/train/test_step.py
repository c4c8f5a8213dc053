"""The loss of a batch against transformers' own, packed against padded, and the heads that cannot be fused."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F

from fastft.data.collate import collate
from fastft.data.training_collator import training_collator
from fastft.graph import attention
from fastft.registry.spec import HeadPoint, ModelSpec
from fastft.state import update_state
from fastft.train import step

FAMILIES = {
    "llama": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 16},
}


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)).item() for name in ours)


def own_loss(model, batch, **kwargs):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, labels=step.document_labels(batch), use_cache=False, **kwargs).loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_transformers(family, lora, build_model, build_rows):
    model = build_model(family, lora=lora, **FAMILIES[family]).train()
    batch = collate(build_rows(5))
    assert step.head_check(model).fused, step.head_check(model).reason
    ours, theirs = step.loss(model, batch), own_loss(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert worst(gradients(model, ours), gradients(model, theirs)) < 1e-5
    items = torch.tensor(37)
    torch.testing.assert_close(
        step.loss(model, batch, items), own_loss(model, batch, num_items_in_batch=items), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(attention, build_model, build_rows):
    model = build_model().train()
    model.get_base_model().set_attn_implementation(attention)
    rows = build_rows(6, seed=3)
    padded, packed = collate(rows), collate(rows, packed=True)
    left = collate(rows, side="left")
    losses = [step.loss(model, batch) for batch in (padded, packed, left)]
    grads = [gradients(model, value) for value in losses]
    for value, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(value, losses[0], rtol=2e-6, atol=0)
        assert worst(grad, grads[0]) < 1e-5


def test_a_token_of_another_document_changes_nothing(build_model, build_rows):
    model = build_model().eval()
    rows = build_rows(2, low=6, high=9)
    alone = step.token_statistics(model, collate(rows[1:]))
    changed = [{"input_ids": [9] * len(rows[0]["input_ids"]), "labels": [-100] * len(rows[0]["input_ids"])}, rows[1]]
    packed = step.token_statistics(model, collate(changed, packed=True))
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-9)


def test_first_token_of_a_document_is_no_target():
    batch = {"labels": torch.arange(1, 8)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])}
    assert step.shifted_labels(batch).tolist() == [[2, 3, -100, 5, -100, 7, -100]]


def test_head_with_lora_and_trained_head(build_model, build_rows):
    batch = collate(build_rows(4))
    everything = ["q_proj", "lm_head"]
    for model in (
        build_model(targets=everything),
        build_model(modules_to_save=["lm_head"]),
        build_model(modules_to_save=["embed_tokens"]),
    ):
        model.train()
        ours, theirs = step.loss(model, batch), own_loss(model, batch)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
        mine, reference = gradients(model, ours), gradients(model, theirs)
        assert worst(mine, reference) < 1e-5
    with_head = build_model(targets=everything)
    assert any("lm_head" in name for name in gradients(with_head, step.loss(with_head.train(), batch)))


def test_tied_head_full_training(build_model, build_rows):
    model = build_model(lora=False, tie_word_embeddings=True).train()
    batch = collate(build_rows(4))
    ours, theirs = step.loss(model, batch), own_loss(model, batch)
    assert worst(gradients(model, ours), gradients(model, theirs)) < 1e-5


def test_wrong_spec_costs_speed_only(build_model, build_rows):
    """A forgotten soft cap is found although the tiny model's logits are far too small to reach it."""
    model = build_model("gemma2", final_logit_softcapping=30.0, head_dim=8).train()
    wrong = ModelSpec("gemma2", ("gemma2",), ("Gemma2DecoderLayer",), head=HeadPoint())
    update_state(model, spec=wrong)
    check = step.head_check(model)
    assert not check.fused and "other logits" in check.reason
    batch = collate(build_rows(3))
    torch.testing.assert_close(step.loss(model, batch), own_loss(model, batch), rtol=1e-6, atol=0)


def test_unknown_family_uses_its_own_forward(build_model, build_rows):
    model = build_model("gpt_neox", lora=False, attention_dropout=0.0, hidden_dropout=0.0).train()
    check = step.head_check(model)
    assert not check.fused and "gpt_neox" in check.reason
    batch, items = collate(build_rows(3)), torch.tensor(19)
    torch.testing.assert_close(
        step.loss(model, batch, items), own_loss(model, batch, num_items_in_batch=items), rtol=1e-6, atol=0
    )


def test_label_smoothing_and_dft(build_model, build_rows):
    model, batch = build_model().train(), collate(build_rows(4))
    targets = step.shifted_labels(batch).flatten()
    logits = model(**step.without_labels(batch)).logits.flatten(0, 1)
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(step.loss(model, batch, label_smoothing=0.1), smoothed, rtol=2e-6, atol=0)
    nll = F.cross_entropy(logits, targets, reduction="none")
    weighted = (nll * torch.exp(-nll).detach()).sum() / targets.ne(-100).sum()
    dft = step.loss(model, batch, loss_type="dft")
    torch.testing.assert_close(dft, weighted, rtol=2e-6, atol=0)
    assert worst(gradients(model, dft), gradients(model, weighted)) < 1e-5


ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
MICRO_BATCHES = [slice(0, 2), slice(2, 5), slice(5, 6)]


def routed(build_model, coefficient):
    """A mixture of experts whose config asks for its router's loss, and six rows of one length."""
    sizes = {**ROUTED, "output_router_logits": True, "router_aux_loss_coef": coefficient}
    model = build_model("mixtral", lora=False, **sizes)
    ids = torch.randint(3, 96, (6, 9), generator=torch.Generator().manual_seed(1))
    return model, {
        "input_ids": ids,
        "labels": ids.masked_fill(ids % 3 == 0, -100),
        "attention_mask": torch.ones_like(ids),
    }


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"label_smoothing": 0.1}], ids=["nll", "dft", "smooth"])
def test_a_routers_loss_counts_once_in_an_accumulated_batch(options, build_model):
    model, batch = routed(build_model, 0.7)
    items = batch["labels"][:, 1:].ne(-100).sum()
    parts = [{name: value[rows] for name, value in batch.items()} for rows in MICRO_BATCHES]
    ours = sum(step.loss(model, part, items, router_share=1 / 3, **options) for part in parts)
    outputs = [model(**{name: part[name] for name in ("input_ids", "attention_mask")}) for part in parts]
    smoothing = options.get("label_smoothing", 0.0)
    nll = [
        F.cross_entropy(output.logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="none",
                        label_smoothing=smoothing)
        for output, part in zip(outputs, parts, strict=True)
    ]  # fmt: skip
    if "loss_type" in options:
        nll = [one * (-one).exp().detach() for one in nll]
    router = sum(output.aux_loss for output in outputs) / 3
    theirs = sum(one.sum() for one in nll) / items + 0.7 * router
    assert router > 0.5 and torch.allclose(ours, theirs, rtol=1e-5)
    assert worst(gradients(model, ours), gradients(model, theirs)) < 1e-4


def test_a_routers_loss_is_that_of_the_model_where_nothing_is_said(build_model):
    model, batch = routed(build_model, 0.7)
    assert torch.allclose(step.loss(model, batch), model(**batch).loss, rtol=1e-6)
    model.config.output_router_logits = False
    assert torch.allclose(step.loss(model, batch), model(**batch).loss, rtol=1e-6)


def test_targets_that_are_shifted_need_no_labels(build_model):
    model, batch = routed(build_model, 0.7)
    shifted = {**batch, "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    del shifted["labels"]
    ours, theirs = step.loss(model, shifted), step.loss(model, batch)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert worst(gradients(model, ours), gradients(model, theirs)) < 1e-4


def test_virtual_tokens_predict_no_first_token(build_model):
    """A row's first token is no target anywhere else, and is not counted as one."""
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build_model(lora=False), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, 3:]
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(step.loss(model, batch), wanted, rtol=1e-6)


def test_statistics_equal_direct_computation(build_model, build_rows):
    model, batch = build_model().eval(), collate(build_rows(4))
    with torch.no_grad():
        logits = model(**step.without_labels(batch)).logits
    targets = step.shifted_labels(batch)
    present = targets.ne(-100)
    nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(-1)
    right = (logits.argmax(-1).eq(targets) & present).sum(-1)
    expected = torch.stack([nll.double(), right.double(), present.sum(-1).double()], dim=-1)
    torch.testing.assert_close(step.token_statistics(model, batch), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(step.statistics_of_logits(logits, batch), expected, rtol=1e-6, atol=1e-9)


def test_batch_without_targets_is_zero_not_nan(build_model):
    model = build_model().train()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.full((1, 3), -100)}
    value = step.loss(model, batch)
    assert value.item() == 0.0
    assert all(torch.isfinite(g).all() and not g.any() for g in gradients(model, value).values())


DATA_PARALLEL = """
import json, os, sys
import tiny, torch
from fastft.train import step

model, batch = tiny.make("llama", torch.float32, lora=True), tiny.batch(0)

def gradients(value):
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, weights)])

plain = gradients(step.loss(model, batch))
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
wrapped, seen = torch.nn.parallel.DistributedDataParallel(model), []
wrapped.register_forward_hook(lambda *args: seen.append(1))
through = gradients(step.loss(wrapped, batch))
print(json.dumps([len(seen), (through - plain).norm().item(), plain.norm().item()]), flush=True)
os._exit(0)
"""


def test_data_parallel_wrapper_is_called_as_a_whole(tmp_path):
    """Through DDP (one process), whose own forward must run for its gradient hooks to be armed.

    In a process that ends without tidying up: once in some hundred times the end of torch's wrapper waits for ever.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DATA_PARALLEL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    calls, apart, size = json.loads(done.stdout.splitlines()[-1])
    assert calls == 1 and apart < 1e-6 * size


def test_autocast_equals_transformers(build_model, build_rows):
    model, batch = build_model().train(), collate(build_rows(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = step.loss(model, batch), own_loss(model, batch)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mask_of_padding_on_the_right_is_not_needed(family):
    """Without it no mask is made, and loss and gradients are those with it: at full rows, and at padded ones."""
    model = tiny.make(family, torch.float32, lora=True)
    full = tiny.batch(0)
    mask = torch.ones_like(full["input_ids"])
    mask[1, 20:] = 0
    padded = {**full, "labels": full["labels"].masked_fill(mask == 0, -100), "attention_mask": mask}
    wanted = [tiny.run(model, batch)[1:] for batch in (full, padded)]
    attention.register()
    model.get_base_model().set_attn_implementation(attention.NAME)
    assert step.head_check(model).fused
    masks = []
    layer = model.get_base_model().model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    for batch, (loss, grads) in zip((full, {**padded, "right_padded": True}), wanted, strict=True):
        value = step.loss(model, batch)
        torch.testing.assert_close(value.double(), loss, rtol=1e-5, atol=0)
        ours = gradients(model, value)
        assert worst({n: g.double() for n, g in ours.items()}, grads) < 2e-5
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 0, 0)] * 2
    left = {**padded, "attention_mask": mask.flip(-1), "right_padded": False}
    step.loss(model, left)
    assert masks[-1].shape[-1] == mask.shape[-1]


@pytest.mark.parametrize("sizes", [(3, 5), (4, 4)])
def test_the_collator_pads_on_the_right_and_says_so(sizes, tokenizer):
    collator = training_collator(tokenizer)
    batch = collator([{"input_ids": [7] * size, "labels": [7] * size} for size in sizes])
    assert batch["right_padded"] is True and batch["valid_rows"] == sum(sizes) - len(sizes)
    assert batch["attention_mask"].sum().item() == sum(sizes)
