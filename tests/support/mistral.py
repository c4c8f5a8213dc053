"""Mistral's tokenizers as transformers has them, rebuilt from the files that mistral-common brings."""

import json
from base64 import b64decode
from pathlib import Path

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

FOLDER = Path(mistral_common.__file__).parent / "data"
CONTROL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip


def tokenizer_of(file: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer in one of mistral-common's files, without a chat template."""
    backend = _tekken(FOLDER / file) if file.endswith(".json") else _sentencepiece(FOLDER / file)
    vocabulary = backend.get_vocab()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL if token in vocabulary])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _tekken(path: Path) -> Tokenizer:
    data = json.loads(path.read_text(encoding="utf-8"))
    config, letters = data["config"], bytes_to_unicode()
    first = config["default_num_special_tokens"]
    pieces = [b64decode(entry["token_bytes"]) for entry in data["vocab"][: config["default_vocab_size"] - first]]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    words = {piece: "".join(letters[byte] for byte in piece) for piece in pieces}
    merges = []
    for piece in pieces:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        cuts = sorted(
            (ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks
        )
        merges += [(words[left], words[right]) for *_, left, right in cuts]
    vocabulary = {
        **{token: index for index, token in enumerate(CONTROL)},
        **{words[p]: first + r for p, r in ranks.items()},
    }
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: Path) -> Tokenizer:
    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(index) for index in range(model.vocab_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    plain = {piece for piece, index in ids.items() if not (model.is_control(index) or model.is_byte(index))}
    merges = []
    for piece in plain:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in plain and right in plain:
                merges.append((-model.get_score(ids[piece]), ids[left], ids[right]))
    merges = [(pieces[left], pieces[right]) for _, left, right in sorted(merges)]
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
