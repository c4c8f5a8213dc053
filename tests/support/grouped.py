"""Prompts and completions side by side, as TRL's trainers hand them over."""

import torch


def make_batch(rows, keep, seed, vocabulary):
    """Return (input_ids, attention_mask) of rows (prompt, its length, length of the completion), of at most `keep`.

    Prompts lie on the right of their columns, completions on the left; rows of one number have the same prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(size for _, size, _ in rows)
    prompts = {}
    ids, mask = torch.zeros(2, len(rows), longest + keep, dtype=torch.long)
    for row, (name, size, completion) in enumerate(rows):
        prompts.setdefault(name, torch.randint(7, vocabulary, (size,), generator=generator))
        ids[row, longest - size : longest] = prompts[name]
        ids[row, longest : longest + completion] = torch.randint(7, vocabulary, (completion,), generator=generator)
        mask[row, longest - size : longest + completion] = 1
    return ids, mask
