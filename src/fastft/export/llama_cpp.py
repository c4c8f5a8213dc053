"""Ask llama.cpp itself: load a GGUF file, tokenise, and compute logits, through an installed package's C functions.

Nothing here is needed to write files. The package `xllamacpp` carries llama.cpp as one shared library; its C functions
are called by ctypes. Two structures that go through those functions by value grow from version to version, so they are
taken as opaque bytes filled by llama.cpp itself, and a field is set only after its surroundings were found to hold the
defaults that llama.cpp documents.
"""

import ctypes
import importlib.util
import struct
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastft.errors import LoadError, UsageError

PACKAGE = "xllamacpp"
_INSTALL = f"install it with: pip install {PACKAGE} (a prebuilt llama.cpp for Linux)"
_ROOM = 1024  # bytes for a structure passed by value; the real ones take between 70 and 200
_F32 = 0  # ggml's number for the type
_TOKENS = ctypes.POINTER(ctypes.c_int32)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Opaque(ctypes.Structure):
    """A structure whose fields are llama.cpp's business; larger than any version's."""

    _fields_ = (("bytes", ctypes.c_uint64 * (_ROOM // 8)),)

    def put(self, offset: int, layout: str, *values: Any) -> None:
        struct.pack_into(layout, self.bytes, offset, *values)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


# name -> (result, arguments)
_FUNCTIONS = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, ctypes.c_void_p)),
    "llama_model_default_params": (_Opaque, ()),
    "llama_context_default_params": (_Opaque, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _Opaque)),
    "llama_model_free": (None, (ctypes.c_void_p,)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _Opaque)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_model_n_ctx_train": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_n_ctx": (ctypes.c_uint32, (ctypes.c_void_p,)),
    "llama_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_bos": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_eos": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_eot": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_pad": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_is_eog": (ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32)),
    "llama_vocab_get_add_bos": (ctypes.c_bool, (ctypes.c_void_p,)),
    "llama_vocab_get_add_eos": (ctypes.c_bool, (ctypes.c_void_p,)),
    "llama_tokenize": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, _TOKENS, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
    ),
    "llama_detokenize": (
        ctypes.c_int32,
        (ctypes.c_void_p, _TOKENS, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
    ),
    "llama_batch_init": (_Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "llama_adapter_lora_init": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)),
    "llama_set_adapters_lora": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)),
    ),
}


class _Library:
    """The loaded shared library, and the last lines of its log."""

    def __init__(self, path: Path) -> None:
        try:
            self.c = ctypes.CDLL(str(path))
        except OSError as error:
            raise LoadError(f"{path}: the shared library of llama.cpp cannot be loaded ({error})") from error
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(self.c, name)
            except AttributeError as error:
                raise LoadError(
                    f"{path}: this llama.cpp has no function {name}; install the version of {PACKAGE} that fastft's "
                    "judges extra names"
                ) from error
            function.restype, function.argtypes = result, arguments
        self.log: deque[str] = deque(maxlen=200)
        self._keep = _LOG(lambda level, text, _: self.log.append(text.decode("utf-8", "replace")))
        self.c.llama_log_set(self._keep, None)
        self.c.llama_backend_init()
        self.context_offset = _offset_of_rope(self.c.llama_context_default_params())

    def told(self) -> str:
        """Return what llama.cpp said last of an error, in one line."""
        lines = [line.strip() for line in "".join(self.log).splitlines()]
        errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
        return "; ".join((errors or lines)[-3:])


def _offset_of_rope(defaults: _Opaque) -> int:
    """Return where `rope_freq_base` lies in llama_context_params.

    Before it stand five enumerations, the last being flash attention (-1, automatic); after it 0, -1, -1, -1, -1, 0,
    -1, two pointers and the types of the key and the value cache (1, f16). Raises LoadError where that is not so.
    """
    raw = bytes(defaults.bytes)
    wanted = struct.pack("<i2f4fIf", -1, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0, 0, -1.0)
    at = raw.find(wanted)
    types = (at + len(wanted) + 7) // 8 * 8 + 16
    first = struct.unpack_from("<3I", raw, 0)
    if at < 0 or raw.find(wanted, at + 1) >= 0 or struct.unpack_from("<2i", raw, types) != (1, 1) or 0 in first[1:]:
        raise LoadError(
            "llama.cpp's llama_context_params has another layout than fastft knows; install the version of "
            f"{PACKAGE} that fastft's judges extra names"
        )
    return at + 4


@cache
def _library() -> _Library:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"llama.cpp is not installed; {_INSTALL}")
    found = [path for folder in spec.submodule_search_locations for path in Path(folder).glob(f"{PACKAGE}*.so")]
    if not found:
        raise UsageError(f"the package {PACKAGE} has no shared library on this machine; {_INSTALL}")
    return _Library(found[0])


def available() -> bool:
    """Say whether llama.cpp can be asked here."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Return why llama.cpp cannot be asked here and what to install, None if it can."""
    try:
        _library()
    except (UsageError, LoadError) as error:
        return str(error)
    return None


class LlamaCpp:
    """A GGUF file loaded by llama.cpp; use it in a `with` statement, or call `close`.

    * `context`: tokens that fit; 0 for the length that the file names.
    * `vocabulary_only`: reads no weights, for tokenising alone.
    * `lora`: a GGUF adapter applied with scale 1.

    Keys, values and logits are fp32, flash attention is off. Raises UsageError where llama.cpp is not installed
    (`why_unavailable`), and LoadError, with what llama.cpp says, for a file that it cannot load.
    """

    def __init__(
        self,
        path: str | Path,
        context: int = 512,
        vocabulary_only: bool = False,
        lora: str | Path | None = None,
        threads: int = 2,
    ) -> None:
        self._lib = _library()
        self._c = self._lib.c
        self._model = self._context = None
        self.path = Path(path)
        if not self.path.is_file():
            raise LoadError(f"{path}: no such file")
        self._lib.log.clear()
        params = self._c.llama_model_default_params()
        if vocabulary_only:
            params.put(_offset_of_vocabulary_only(params), "<?", True)
        self._model = self._c.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            raise LoadError(f"{self.path}: llama.cpp cannot load it ({self._lib.told()})")
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._c.llama_vocab_n_tokens(self._vocab)
        self.bos, self.eos, self.eot, self.pad = (
            getattr(self._c, f"llama_vocab_{name}")(self._vocab) for name in ("bos", "eos", "eot", "pad")
        )
        self.add_bos: bool = self._c.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = self._c.llama_vocab_get_add_eos(self._vocab)
        if not vocabulary_only:
            self._open_context(context, threads)
            if lora is not None:
                self._apply(Path(lora))

    def _open_context(self, context: int, threads: int) -> None:
        params, rope = self._c.llama_context_default_params(), self._lib.context_offset
        size = context or self._c.llama_model_n_ctx_train(self._model)
        params.put(0, "<3I", context, size, min(size, 512))  # n_ctx, n_batch, n_ubatch
        params.put(rope - 4, "<i", 0)  # flash attention off
        params.put((rope + 32 + 7) // 8 * 8 + 16, "<2i", _F32, _F32)  # types of the key and the value cache
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            told = self._lib.told()
            self.close()
            raise LoadError(f"{self.path}: llama.cpp makes no context of {context} tokens ({told})")
        self._c.llama_set_n_threads(self._context, threads, threads)

    def _apply(self, lora: Path) -> None:
        adapter = self._c.llama_adapter_lora_init(self._model, str(lora).encode()) if lora.is_file() else None
        if not adapter:
            told = self._lib.told() if lora.is_file() else "no such file"
            self.close()
            raise LoadError(f"{lora}: llama.cpp cannot load this adapter beside {self.path} ({told})")
        failed = self._c.llama_set_adapters_lora(
            self._context, (ctypes.c_void_p * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)
        )
        if failed:
            self.close()
            raise LoadError(f"{lora}: llama.cpp does not apply this adapter (code {failed})")

    def close(self) -> None:
        """Free the model and its context; a second call does nothing."""
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of `text`; `parse_special` reads the text of special tokens as those tokens."""
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of `ids`; `special` renders special tokens too."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 64
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._c.llama_detokenize(self._vocab, tokens, len(ids), text, room, False, special)
            if count >= 0:
                return text.raw[:count].decode("utf-8", "replace")
            room = -count

    def ends_generation(self, token: int) -> bool:
        """Say whether llama.cpp stops generating at this token."""
        return self._c.llama_vocab_is_eog(self._vocab, token)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of `ids` (one sequence from position 0), fp32 [tokens, vocabulary]."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        return self._decode(ids, 0)

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Return `new_tokens` ids, each the likeliest after all before it; it does not stop at end tokens."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        new = [int(self._decode(ids, 0)[-1].argmax())]
        while len(new) < new_tokens:
            new.append(int(self._decode(new[-1:], len(ids) + len(new) - 1)[-1].argmax()))
        return new

    def _decode(self, ids: Sequence[int], start: int) -> torch.Tensor:
        room = self._c.llama_n_ctx(self._context) if self._context else 0
        if not ids or start + len(ids) > room:
            raise UsageError(f"{len(ids)} tokens from position {start} do not fit a context of {room} tokens")
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index], batch.pos[index] = int(token), start + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            failed = self._c.llama_decode(self._context, batch)
        finally:
            self._c.llama_batch_free(batch)
        if failed:
            raise LoadError(f"{self.path}: llama.cpp could not compute {len(ids)} tokens ({self._lib.told()})")
        rows = ctypes.cast(
            self._c.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float * (len(ids) * self.vocab_size))
        )
        return torch.frombuffer(bytearray(rows.contents), dtype=torch.float32).view(len(ids), self.vocab_size)


def _offset_of_vocabulary_only(defaults: _Opaque) -> int:
    """Return where `vocab_only` lies in llama_model_params: the first of the booleans that end it.

    They follow the pointers to a progress callback, its data and the overrides, all null, and by default read false,
    false, true (`use_extra_bufts`). Raises LoadError where that is not so.
    """
    raw = bytes(defaults.bytes)
    for at in range(32, 112, 8):
        if raw[at - 24 : at] == bytes(24) and raw[at : at + 3] == b"\0\0\1":
            return at
    raise LoadError(
        "llama.cpp's llama_model_params has another layout than fastft knows; install the version of "
        f"{PACKAGE} that fastft's judges extra names"
    )
