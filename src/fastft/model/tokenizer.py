"""Load a tokenizer, and bring its special tokens and the model's configs into agreement."""

from pathlib import Path
from typing import Any

from fastft.errors import LoadError
from fastft.model.files import NO_TOKENIZER, has_tokenizer

# Tokens that checkpoints carry for padding or leave unused, best first.
PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|PAD_TOKEN|>",
    "<|vision_pad|>",
    "<|fim_pad|>",
    "<|reserved_special_token_0|>",
    "<|reserved_0|>",
    "<unused0>",
    "<|dummy_0|>",
    "<unk>",
    "<|unk|>",
)
NEW_PAD = "<|pad|>"


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a local folder; `LoadError` names the folder and what is missing or damaged."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise LoadError(f"{folder}: {NO_TOKENIZER}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the Rust tokenizers library raises bare Exception for a damaged tokenizer.json
        raise LoadError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error}); fetch its files again"
        ) from error


def id_list(value: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Return token ids as a list, from one id, several, or none."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def end_tokens(tokenizer: Any, generation_config: Any, config: Any) -> list[int]:
    """Return every token that ends an answer: the tokenizer's EOS, and those of a generation config and a config.

    Any of the three may be None.
    """
    text_config = config.get_text_config() if config is not None else None
    named = (getattr(one, "eos_token_id", None) for one in (tokenizer, generation_config, text_config))
    return list(dict.fromkeys(index for ids in named for index in id_list(ids)))


def settle_special_tokens(model: Any, tokenizer: Any) -> list[str]:
    """Put EOS, BOS and the pad token right in `tokenizer`, `model.config` and `model.generation_config`.

    * The pad token differs from every end token, else the end of an answer would be masked away in training. An unused
      token of the vocabulary serves where there is one; only else is one added (by `fastft.model.tokens`).
    * `config.eos_token_id` names the tokenizer's EOS (a list stays a list); generation also keeps the other end tokens.
    * BOS is the tokenizer's. Padding is on the left, as generation needs it.
    Returns a sentence for each thing changed.
    """
    notes = _settle_eos(model, tokenizer)
    notes += _settle_pad(model, tokenizer)
    for config in _configs(model):
        if config.bos_token_id != tokenizer.bos_token_id:
            notes.append(
                f"BOS id {config.bos_token_id} of {_kind(config)} became {tokenizer.bos_token_id}, the tokenizer's"
            )
            config.bos_token_id = tokenizer.bos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        notes.append(
            f"{len(beyond)} tokens of the tokenizer have no row in the embeddings, such as {beyond[0]!r}; a text that "
            "holds one cannot be embedded (add_tokens gives them rows)"
        )
    return notes


def _configs(model: Any) -> list[Any]:
    generation = getattr(model, "generation_config", None)
    return [model.config.get_text_config()] + ([generation] if generation is not None else [])


def _kind(config: Any) -> str:
    return "generation_config" if type(config).__name__ == "GenerationConfig" else "config"


def _settle_eos(model: Any, tokenizer: Any) -> list[str]:
    notes = []
    known = id_list(model.config.get_text_config().eos_token_id)
    if tokenizer.eos_token_id is None:
        inside = [index for index in known if index < len(tokenizer)]
        if not inside:
            return ["neither the tokenizer nor the config names an end-of-text token; generation stops by length only"]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(inside[0])
        notes.append(f"the tokenizer had no EOS; it took {tokenizer.eos_token!r} from the config")
    eos = tokenizer.eos_token_id
    for config in _configs(model):
        old = config.eos_token_id
        ids = id_list(old)
        if _kind(config) == "generation_config":
            ids = list(dict.fromkeys([*([] if eos in ids else [eos]), *ids, *known]))
            new = ids if len(ids) > 1 or isinstance(old, (list, tuple)) else eos
        elif isinstance(old, (list, tuple)):
            new = ids if eos in ids else [eos, *ids]
        else:
            new = eos
        if new != old:
            notes.append(
                f"EOS id {old} of {_kind(config)} became {new}; the tokenizer's is {eos} ({tokenizer.eos_token!r})"
            )
            config.eos_token_id = new
    return notes


def _settle_pad(model: Any, tokenizer: Any) -> list[str]:
    rows = model.get_input_embeddings().weight.shape[0]
    generation = getattr(model, "generation_config", None)
    ends = {*id_list(tokenizer.eos_token_id), *id_list(getattr(generation, "eos_token_id", None))}
    pad = tokenizer.pad_token_id
    if pad is not None and pad not in ends and pad < rows:
        old = model.config.get_text_config().pad_token_id
        same = old is None or old == pad
        return [] if same else [f"pad id {old} of config became {pad}, the tokenizer's ({tokenizer.pad_token!r})"]
    if pad is None:
        why = "the tokenizer had no pad token"
    elif pad in ends:
        why = f"the pad token was {tokenizer.pad_token!r}, which ends a text"
    else:
        why = f"the pad token {tokenizer.pad_token!r} (id {pad}) has no row in the embeddings ({rows} rows)"
    vocab, template = tokenizer.get_vocab(), str(getattr(tokenizer, "chat_template", None) or "")
    for token in PAD_CANDIDATES:
        if token in vocab and vocab[token] < rows and vocab[token] not in ends and token not in template:
            tokenizer.pad_token = token
            return [f"{why}; {token!r} (id {vocab[token]}) now pads"]
    from fastft.model.tokens import extend_vocabulary

    new = next(token for token in (NEW_PAD, *(f"<|pad_{i}|>" for i in range(len(vocab) + 1))) if token not in vocab)
    tokenizer.add_special_tokens({"pad_token": new})
    extend_vocabulary(model, [tokenizer.pad_token_id])
    after = model.get_input_embeddings().weight.shape[0]
    grown = f", and the embeddings grew from {rows} to {after} rows" if after != rows else ""
    return [f"{why} and none was spare; {new!r} (id {tokenizer.pad_token_id}) was added{grown}"]
