"""Token arrays for training the demo model, so that the training machine needs neither the texts nor a tokenizer run.

Tokens are uint16; the highest bit marks a token that bears no loss (prompts and padding).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np

from fastft.demo import corpus, tasks
from fastft.demo.tokenizer import END_OF_TEXT, PAD, save_tokenizer, segments, train_tokenizer

NO_LOSS = 0x8000
ROW = 512  # tokens of one training sequence, and the context length of the model
_BATCH = 2000


def build(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Write the tokenizer, text.npy and code.npy [tokens], chat.npy [rows, ROW] and held-out data; return the sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held = corpus.split(corpus.documents())
    Random(seed).shuffle(train)
    texts, code = [document.text for document in train], corpus.code()
    sample = ["".join(text for text, _ in segments(c)) for c in tasks.conversations(4000, seed + 1, train)]
    tokenizer = train_tokenizer([*texts, *sample], ROW)
    save_tokenizer(tokenizer, folder)
    end, pad = tokenizer.convert_tokens_to_ids([END_OF_TEXT, PAD])

    stream, code = _stream(tokenizer, texts, end), _stream(tokenizer, Random(seed).sample(code, len(code)), end)
    chat = _rows(tokenizer, tasks.conversations(count, seed, train), pad)
    chat_held = _rows(tokenizer, tasks.conversations(2000, seed + 2, train), pad)
    np.save(folder / "text.npy", stream)
    np.save(folder / "code.npy", code)
    np.save(folder / "chat.npy", chat)
    np.save(folder / "held_out_chat.npy", chat_held)
    held_text = _limited(held, 80_000, seed)
    (folder / "held_out.txt").write_text(held_text, "utf-8")
    sizes = {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "text_tokens": len(stream),
        "code_tokens": len(code),
        "conversations": count,
        "chat_tokens": int((chat != pad | NO_LOSS).sum()),
        "held_out_characters": len(held_text),
        "seed": seed,
    }
    (folder / "data.json").write_text(json.dumps(sizes, indent=2) + "\n")
    return sizes


def _stream(tokenizer, texts: list[str], end: int) -> np.ndarray:
    """Tokens of all texts, each after an end-of-text token."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([end, *one.ids], dtype=np.uint16) for one in encoded])


def _limited(texts: list[str], characters: int, seed: int) -> str:
    """Join texts, in a shuffled order, until there are about so many characters."""
    chosen: list[str] = []
    for text in Random(seed).sample(texts, len(texts)):
        if sum(map(len, chosen)) >= characters:
            break
        chosen.append(text[:4000])
    return "\n\n\n".join(chosen) + "\n"


def _rows(tokenizer, conversations: Iterator[list[tasks.Message]], pad: int) -> np.ndarray:
    """Pack whole conversations into rows of ROW tokens; a conversation never spans two rows."""
    rows: list[list[int]] = []
    row: list[int] = []
    for tokens in _encoded(tokenizer, conversations):
        if len(tokens) > ROW:
            continue  # none is; a longer one could not be trained on whole
        if len(row) + len(tokens) > ROW:
            rows.append(row + [pad | NO_LOSS] * (ROW - len(row)))
            row = []
        row = row + tokens
    rows.append(row + [pad | NO_LOSS] * (ROW - len(row)))
    return np.array(rows, dtype=np.uint16)


def _encoded(tokenizer, conversations: Iterator[list[tasks.Message]]) -> Iterator[list[int]]:
    batch: list[list[tuple[str, bool]]] = []
    for conversation in conversations:
        batch.append(segments(conversation))
        if len(batch) == _BATCH:
            yield from _encode_batch(tokenizer, batch)
            batch = []
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer, batch: list[list[tuple[str, bool]]]) -> Iterator[list[int]]:
    flat = [text for pieces in batch for text, _ in pieces]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False)) if flat else iter(())
    for pieces in batch:
        yield [token if learn else token | NO_LOSS for _, learn in pieces for token in next(encoded).ids]
