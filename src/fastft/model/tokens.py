"""Add tokens: tokenizer, embeddings and head grow together, new rows at the mean of the old ones."""

from collections.abc import Sequence
from typing import Any

import torch

from fastft.errors import Problem, UsageError
from fastft.given import refuse_pair
from fastft.state import base_model, get_state, update_state


def add_tokens(model: Any, tokenizer: Any, tokens: str | Sequence[str], special: bool = False) -> int:
    """Add `tokens` to the tokenizer, give them rows in embeddings and head, and return how many were new.

    New rows are the mean (taken in fp32) of the rows of the tokens that were there before; tied weights stay tied. A
    token that the vocabulary has already is not added again. `special` tokens are left out by
    `decode(skip_special_tokens=True)`. A later `add_lora` trains the new rows and saves them in the adapter.

    Raises `UsageError` if the model already carries an adapter or is compiled, or for tokens that are no texts.
    """
    refuse_pair(model, tokenizer)
    wanted = [tokens] if isinstance(tokens, str) else list(tokens)
    _check(model, wanted)
    from transformers import AddedToken

    vocab = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(wanted) if token not in vocab]
    if not new:
        return 0
    added = [AddedToken(token, special=special, normalized=False) for token in new]
    count = tokenizer.add_tokens(added, special_tokens=special)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in new]
    extend_vocabulary(model, ids)
    state = get_state(model)
    note = f"{count} tokens were added (ids {ids[0]} to {ids[-1]}), their rows at the mean of the others"
    update_state(model, added_tokens=(*state.added_tokens, *ids), notes=(*state.notes, note), tokenizer=tokenizer)
    return count


def _check(model: Any, tokens: list[Any]) -> None:
    problems: list[Problem | str] = [
        Problem("tokens", token, "a non-empty text") for token in tokens if not isinstance(token, str) or not token
    ]
    if getattr(model, "peft_config", None):
        problems.append(
            "add_tokens: the model already carries an adapter, which fixed which rows are trained; call add_tokens "
            "right after load and before add_lora, which then trains the new rows"
        )
    if get_state(model).compiled is not None:
        problems.append("add_tokens: the model is compiled already; call add_tokens before fastft.compile")
    head = base_model(model).get_output_embeddings()
    if head is not None and not head.weight.is_floating_point():
        problems.append("add_tokens: the head's weight is quantised and cannot grow; load with the head in 16 bits")
    if problems:
        raise UsageError(*problems)


def extend_vocabulary(model: Any, ids: Sequence[int]) -> None:
    """Give the new token `ids` rows in embeddings and head, at the mean (in fp32) of the rows below the first of them.

    A bias of the head is treated alike. The matrices grow only if they lack rows (many checkpoints are padded), and
    never shrink.
    """
    base = base_model(model)
    rows = base.get_input_embeddings().weight.shape[0]
    old = min(min(ids), rows)
    if max(ids) >= rows:
        base.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    _fill(embeddings.weight, ids, old)
    if head is not None and head.weight is not embeddings.weight:
        _fill(head.weight, ids, old)
    if head is not None and getattr(head, "bias", None) is not None:
        _fill(head.bias, ids, old)


@torch.no_grad()
def _fill(table: torch.Tensor, ids: Sequence[int], old: int) -> None:
    index = torch.tensor(ids, device=table.device, dtype=torch.long)
    mean = table[:old].float().mean(dim=0)
    table.index_copy_(0, index, mean.to(table.dtype).expand(len(index), *mean.shape).contiguous())


def missing_tokens(base_tokenizer: Any, tokenizer: Any) -> list[int]:
    """Return the ids that `tokenizer` has and `base_tokenizer` has not, in order."""
    known = set(base_tokenizer.get_vocab().values())
    return sorted(set(tokenizer.get_vocab().values()) - known)
