"""Ollama's Modelfile for a GGUF file, from the same record as the template that trained the model."""

import itertools
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.errors import Problem, SaveError, UsageError
from fastft.registry.chat import chat_format, with_tokens
from fastft.registry.chat_format import ChatFormat
from fastft.train.checkpoint import write_text

MODELFILE = "Modelfile"
# Ollama serves 4096 tokens if it is told nothing, and a key-value cache of every token that it is told.
MOST_CONTEXT = 8192
# What else may be set, and as what (https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx).
PARAMETERS: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repeat_penalty": float,
    "repeat_last_n": int,
    "num_predict": int,
    "num_keep": int,
    "seed": int,
}


def modelfile(
    gguf: str | Path,
    tokenizer: Any,
    chat_format: str | None = None,
    system: str | None = None,
    num_ctx: int | None = None,
    **parameters: float,
) -> str:
    """Return the text of a Modelfile: FROM, TEMPLATE, stop parameters, num_ctx, SYSTEM.

    * `gguf`: what FROM names, as it is to be found from the Modelfile's own folder.
    * `chat_format`: a name of `fastft.registry.chat`; None for the format that the tokenizer's template renders.
    * `system`: a system message for conversations that bring none.
    * `num_ctx`: tokens that Ollama keeps; None for the length the model was trained for, at most 8192.
    * `parameters`: further ones of `PARAMETERS`, such as temperature=0.7.

    Raises `UsageError`, all mistakes at once: no known format, a stop token that the vocabulary does not have, a
    system message where the format has no place for it.
    """
    form = _format(tokenizer, chat_format)
    problems = [*_format_problems(form, tokenizer, system), *_parameter_problems(parameters, num_ctx)]
    if problems:
        raise UsageError(*problems)
    lines = [f"FROM {gguf}", f"TEMPLATE {_quoted(form.ollama_template)}"]
    lines += [f"PARAMETER stop {_text(stop)}" for stop in form.ollama_stops]
    lines.append(f"PARAMETER num_ctx {num_ctx or _context(tokenizer)}")
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
    return "\n".join(lines) + "\n"


def write_modelfile(gguf: str | Path, tokenizer: Any, name: str = MODELFILE, **options: Any) -> Path:
    """Write the Modelfile of a GGUF file beside it and return its path; `options` are those of `modelfile`.

    Another text that is there, edited by hand perhaps, is kept as NAME.earlier (NAME.earlier-2 and so on), and a line
    says so.
    """
    gguf = Path(gguf).expanduser()
    if not gguf.is_file() or gguf.suffix != ".gguf":
        raise UsageError(Problem("gguf", str(gguf), "a .gguf file that is there", "Write one with fastft.export_gguf."))
    path = gguf.parent / name
    text = modelfile(f"./{gguf.name}", tokenizer, **options)
    if path.is_file() and path.read_bytes() != text.encode():
        names = (f"{path.name}.earlier" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
        earlier = next(place for place in map(path.with_name, names) if not place.exists())
        shutil.copy2(path, earlier)
        print(f"fastft: {path} was another one before, or edited: that is kept as {earlier.name}.")
    write_text(path, text)
    return path


def create_ollama_model(path: str | Path, name: str) -> str:
    """Run `ollama create NAME -f PATH` and return what it says.

    Raises `UsageError` where the program is not installed, with what to do, and `SaveError` with its own words if it
    fails.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(Problem("Modelfile", str(path), "a file that is there", "Write it with write_modelfile."))
    program = ollama_program(name, path)
    done = subprocess.run([program, "create", name, "-f", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SaveError(f"ollama create {name} -f {path} failed: {said[-1] if said else f'code {done.returncode}'}")
    return (done.stdout or done.stderr).strip()


def ollama_program(name: str, path: str | Path) -> str:
    """Return where the program ollama is; raises `UsageError` with the line to run once it is installed."""
    program = shutil.which("ollama")
    if program is None:
        raise UsageError(
            f"the program ollama is not on this machine's PATH; install it (https://ollama.com/download), then run: "
            f"ollama create {name} -f {path}"
        )
    return program


def _format(tokenizer: Any, name: str | None) -> ChatFormat:
    if name is not None:
        return with_tokens(chat_format(name), bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    from fastft.data.known_format import recognise_format

    form = recognise_format(tokenizer)
    if form is None:
        raise UsageError(
            "Modelfile: the tokenizer's chat template is none that fastft knows, so there is no Go template of it; "
            "pass chat_format= (fastft registry formats lists them), or write TEMPLATE by hand"
        )
    return form


def _format_problems(form: ChatFormat, tokenizer: Any, system: str | None) -> list[Problem | str]:
    vocabulary = tokenizer.get_vocab()
    problems: list[Problem | str] = []
    if form.stop_token not in vocabulary:
        problems.append(
            f"chat format {form.name!r} ends an answer with {form.stop_token!r}, which is no token of this tokenizer: "
            "the model could not end one; choose the format that it was trained with"
        )
    if system and form.system_rule == "refused":
        remedy = "Leave it out, or put it into the first message."
        problems.append(Problem("system", system, f"None: chat format {form.name!r} has no system message", remedy))
    wrong = [text for text in (form.ollama_template, system or "") if '"""' in text]
    if wrong:
        problems.append(Problem("TEMPLATE or SYSTEM", wrong[0], 'a text without """, which ends it in a Modelfile'))
    return problems


def _parameter_problems(parameters: Mapping[str, Any], num_ctx: Any) -> list[Problem]:
    problems = []
    for name, value in parameters.items():
        wanted = PARAMETERS.get(name)
        if wanted is None:
            problems.append(Problem(f"parameter {name}", value, f"one of {', '.join(PARAMETERS)}"))
        elif isinstance(value, bool) or not isinstance(value, int if wanted is int else int | float):
            problems.append(Problem(name, value, "a whole number" if wanted is int else "a number"))
    if num_ctx is not None and (not isinstance(num_ctx, int) or isinstance(num_ctx, bool) or num_ctx < 1):
        problems.append(Problem("num_ctx", num_ctx, "a positive number of tokens, or None"))
    return problems


def _context(tokenizer: Any) -> int:
    length = getattr(tokenizer, "model_max_length", None)
    return min(int(length), MOST_CONTEXT) if length else MOST_CONTEXT


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _text(stop: str) -> str:
    return _quoted(stop) if '"' in stop or "\n" in stop else f'"{stop}"'
