"""Train the demo model from scratch on the token arrays: full training of every weight, in an explicit loop.

With `plain=True` the loop runs transformers alone; otherwise it is fastft's own full fine-tuning, `fastft.compile` for
the model and `fastft.train.step.loss` for the head.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from attrs import asdict, frozen
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastft.demo import evaluate, lesson, tasks
from fastft.demo.arrays import NO_LOSS, ROW
from fastft.demo.tokenizer import END_OF_TEXT, save_tokenizer


@frozen
class Recipe:
    """How the model is trained; one step sees `rows` sequences of 512 tokens."""

    steps: int = 1800
    rows: int = 128
    text_share: float = 0.13
    code_share: float = 0.12
    """Shares of the rows that are library text and library code; the others are conversations."""
    peak_lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.02
    """Learning rate at the end, as a share of the peak (cosine from peak to end)."""
    weight_decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: about 4.5 M parameters, every linear's input a multiple of 256 wide."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=ROW,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batch_maker(folder: Path, recipe: Recipe, device: str) -> Callable[[int], dict[str, Tensor]]:
    """Return a function from step to batch: `input_ids` and `labels` [rows, 512] int64, the same for the same step.

    Text and code come as windows at random offsets, conversations row by row through a fresh shuffle each epoch.
    """
    text, code, chat = (
        torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int32)).to(device)
        for name in ("text", "code", "chat")
    )
    text_rows, code_rows = round(recipe.rows * recipe.text_share), round(recipe.rows * recipe.code_share)
    chat_rows = recipe.rows - text_rows - code_rows
    reach = torch.arange(ROW, device=device)

    def order(epoch: int) -> Tensor:
        return torch.randperm(len(chat), generator=torch.Generator().manual_seed(recipe.seed + 7919 * epoch)).to(device)

    orders: dict[int, Tensor] = {}

    def make(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)

        def windows(stream: Tensor, count: int) -> Tensor:
            offsets = torch.randint(len(stream) - ROW, (count,), generator=generator).to(device)
            return stream[offsets[:, None] + reach]

        first = step * chat_rows
        picked = []
        for epoch in range(first // len(chat), (first + chat_rows - 1) // len(chat) + 1):
            if epoch not in orders:
                orders.clear()
                orders[epoch] = order(epoch)
            low, high = max(first - epoch * len(chat), 0), min(first + chat_rows - epoch * len(chat), len(chat))
            picked.append(orders[epoch][low:high])
        marked = torch.cat([windows(text, text_rows), windows(code, code_rows), chat[torch.cat(picked)]])
        ids = (marked & (NO_LOSS - 1)).long()
        return {"input_ids": ids, "labels": ids.masked_fill(marked & NO_LOSS != 0, -100)}

    return make


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from `peak_lr` to `final_lr` times that."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    done = min((step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1), 1.0)
    return recipe.peak_lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, fused=True)


def plain_loss(model: LlamaForCausalLM, batch: dict[str, Tensor], num_items: Tensor) -> Tensor:
    """Next-token loss through transformers: mean over the tokens that bear loss, fp32."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / num_items


def _prepare(model: LlamaForCausalLM, plain: bool, backend: str) -> Callable[..., Tensor]:
    """Compile the decoder layers, and return the loss function."""
    if not plain:
        from fastft.graph.compile import compile as compile_model
        from fastft.train.step import loss

        compile_model(model, backend=backend)
        return loss
    if backend != "eager":
        for layer in model.model.layers:
            layer.compile(backend=backend)
    return plain_loss


def train(
    data: Path, out: Path, recipe: Recipe, *, device: str, plain: bool, backend: str, minutes: float, every: float
) -> dict:
    """Train, evaluate every so many seconds, and write the model folder and training.json into `out`.

    Stops with an error if the steps would take longer than `minutes`; the recipe is a number of steps so that it can be
    repeated.
    """
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(data, padding_side="left")
    model = LlamaForCausalLM(config(tokenizer)).to(device)
    model.train()
    judge = LlamaForCausalLM(copy.deepcopy(model.config)).to(device, torch.bfloat16).eval()
    opt, make, loss_of = optimizer(model, recipe), batch_maker(data, recipe, device), _prepare(model, plain, backend)
    began = last = time.monotonic()
    history: list[dict] = []
    for step in range(recipe.steps):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = make(step)
        items = (batch["labels"][:, 1:] != -100).sum()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(model, batch, items)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        opt.step()
        opt.zero_grad()
        if step % 50 == 0 or step == recipe.steps - 1:
            seconds = time.monotonic() - began
            history.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(seconds, 1)})
            speed = (step + 1) * recipe.rows * ROW / max(seconds, 1e-9)
            print(
                f"step {step:5d}  loss {loss.item():.4f}  norm {norm.item():.2f}  {seconds:6.1f} s  {speed:,.0f} tok/s"
            )
            if seconds > 60 * minutes:
                print(f"stopped: the {minutes} minutes are over")
                break
        if time.monotonic() - last > every and step < recipe.steps - 1:
            print(json.dumps(measure(_copied(model, judge), tokenizer, data, samples=False)), flush=True)
            last = time.monotonic()
    result = measure(_save(model, judge, tokenizer, out, device), tokenizer, data, samples=True)
    tokens = (step + 1) * recipe.rows * ROW
    seconds = time.monotonic() - began
    result |= {"recipe": asdict(recipe), "tokens": tokens, "seconds": round(seconds, 1), "plain": plain}
    result |= {"device": torch.cuda.get_device_name() if device == "cuda" else device, "history": history}
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


@torch.no_grad()
def _copied(model: LlamaForCausalLM, judge: LlamaForCausalLM) -> LlamaForCausalLM:
    for target, source in zip(judge.parameters(), model.parameters(), strict=True):
        target.copy_(source)
    return judge


def _save(model, judge, tokenizer, out: Path, device: str) -> LlamaForCausalLM:
    """Write weights in bf16, tokenizer and generation config; return the model as loaded back from there."""
    saved = _copied(model, judge)
    saved.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    saved.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device).eval()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path, *, samples: bool) -> dict:
    """Held-out perplexities, accuracies of held-out sums (as the base knows them, and as stories), and samples."""
    ids = tokenizer((data / "held_out.txt").read_text("utf-8"), add_special_tokens=False)["input_ids"]
    result = {"text_perplexity": round(evaluate.perplexity(model, ids, tokenizer.bos_token_id), 3)}
    result["chat_perplexity"] = round(_chat_perplexity(model, data), 3)
    for name, ask in {"plain_sums": tasks.plain_addition, "story_sums": lesson.story}.items():
        accuracy, given = evaluate.addition_accuracy(model, tokenizer, ask)
        result |= {name: accuracy, f"{name}_answers": given[:3]}
    if samples:
        result["samples"] = evaluate.samples(model, tokenizer)
    return result


@torch.no_grad()
def _chat_perplexity(model: LlamaForCausalLM, data: Path) -> float:
    """Perplexity of the answers' tokens in the held-out conversations."""
    marked = torch.from_numpy(np.load(data / "held_out_chat.npy").astype(np.int32))[:64].to(model.device)
    ids = (marked & (NO_LOSS - 1)).long()
    batch = {"input_ids": ids, "labels": ids.masked_fill(marked & NO_LOSS != 0, -100)}
    items = (batch["labels"][:, 1:] != -100).sum()
    return math.exp(plain_loss(model, batch, items).item())
