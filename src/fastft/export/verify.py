"""Is the exported model the model that was trained? The same prompts through both, and the differences in numbers."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen
from torch import Tensor, nn

from fastft.errors import FastftError, LoadError, Problem, UsageError
from fastft.export.compare import Distance, Limits, distance, limits_of
from fastft.export.engines import CONTEXT, Engine, artefact_problem, engine, run_model, token_ids
from fastft.export.folder import assumptions, find_weights, load_folder
from fastft.export.questions import Message, Prompt, Questions, questions_of, render, room_of
from fastft.given import refuse_export
from fastft.model.files import ADAPTER_CONFIG
from fastft.state import base_model, get_state

TEXT_TOKENS = CONTEXT


@frozen
class ArtefactReport:
    """What was found of one exported file or folder.

    `same_prompts` and `same_ids` are None where they could not be compared. `base_kl` is its mean KL divergence from
    the model without its adapters, None without any. `distance` is None of what could not be read or run. `problems` is
    empty if all is well.
    """

    path: str
    kind: str
    runner: str
    same_prompts: bool | None
    same_ids: bool | None
    distance: Distance | None
    base_kl: float | None
    limits: Limits | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems


@frozen
class ExportReport:
    """What `verify_export` found; `str` of it is a table."""

    reference: str
    prompts: int
    artefacts: tuple[ArtefactReport, ...]
    adapter_kl: float | None
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every artefact is the model that was trained, within its kind's limits."""
        return all(artefact.ok for artefact in self.artefacts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        plain = asdict(self)
        for part, artefact in zip(plain["artefacts"], self.artefacts, strict=True):
            part["ok"] = artefact.ok
        return {**plain, "ok": self.ok}

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the table: heading and rows."""
        head = ("artefact", "kind", "run by", "prompts", "ids", "max diff", "KL", "allowed", "same top 1", "perplexity")
        rows = []
        for artefact in self.artefacts:
            found, limits = artefact.distance, artefact.limits
            rows.append(
                (
                    Path(artefact.path).name,
                    artefact.kind,
                    artefact.runner,
                    _same(artefact.same_prompts),
                    _same(artefact.same_ids),
                    "-" if found is None else f"{found.largest_difference:.3g}",
                    "-" if found is None else f"{found.kl:.2e}",
                    "-" if limits is None else f"{limits.kl:.2g}",
                    "-" if found is None else f"{found.same_choice:.1%}",
                    "-" if found is None else f"{found.perplexity:.3f} ({found.perplexity_rise:+.2%})",
                )
            )
            rows[-1] += ("ok" if artefact.ok else "FAILED",)
        return (*head, "verdict"), rows

    def __str__(self) -> str:
        head, rows = self.rows()
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = [f"reference: {self.reference}"]
        if self.adapter_kl is not None:
            lines.append(f"without its adapters the model is at KL {self.adapter_kl:.2e} from itself")
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
        for artefact in self.artefacts:
            name = Path(artefact.path).name
            lines += [f"FAILED {name}: {problem}" for problem in artefact.problems]
            lines += [f"note {name}: {note}" for note in artefact.notes]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def verify_export(
    model: Any,
    tokenizer: Any = None,
    artefact: str | Path | Sequence[str | Path] = (),
    prompts: Sequence[Prompt] | None = None,
    text: str | None = None,
    text_tokens: int = TEXT_TOKENS,
    limits: Limits | None = None,
) -> ExportReport:
    """Compare exported files and folders with the model that they come from.

    * `model`: the trained model as it is, its adapters on; or the folder of an adapter, a run or a model.
    * `tokenizer`: None for the one that was loaded with the model.
    * `artefact`: a merged or adapter folder, a .gguf file, a folder of them, or several of these.
    * `prompts`: texts or conversations; by default four conversations (system message, several turns, other scripts,
      code), plain if the tokenizer has no chat template. `text`: held-out text for the perplexity, of which
      `text_tokens` tokens are read; by default English that comes with fastft.
    * `limits`: what is allowed; None for the artefact's kind, in `fastft.export.compare`.

    Compared are the rendered prompts, the token ids, and the logits (largest difference, mean KL divergence, share of
    equal first choices, perplexity). With adapters, an artefact must also be nearer to the trained model than to the
    model without them. GGUF files run in llama.cpp (package xllamacpp), or, where that is missing, dequantised through
    transformers, which a note says. What cannot be read has failed, with its reason; a GGUF file of an adapter alone is
    left out with a note, and refused where there is nothing else. Nothing is written and the model is left as it was.
    """
    refuse_export(model, tokenizer)
    notes: list[str] = []
    paths = artefacts_in(artefact, notes)
    model, tokenizer, reference = _reference(model, tokenizer, notes)
    questions = questions_of(tokenizer, prompts, text, text_tokens, room_of(model), notes)
    with _evaluating(model):
        expected = [run_model(model, ids) for ids in questions.ids]
        base = _without_adapters(model, questions)
        adapter_kl = _kl(expected, base, questions) if base else None
        held = "int8" if get_state(model).quant == "int8" else str(base_model(model).dtype).removeprefix("torch.")
        reports = []
        for path in paths:
            try:
                with engine(path, model, tokenizer) as opened:
                    report = _judge(path, opened, tokenizer, questions, expected, base, held)
            except FastftError as error:
                reports.append(_unreadable(path, error))
            else:
                reports.append(_limited(report, limits or report.limits, adapter_kl))
    return ExportReport(reference, len(questions.prompts), tuple(reports), adapter_kl, tuple(notes))


def _reference(model: Any, tokenizer: Any, notes: list[str]) -> tuple[Any, Any, str]:
    if isinstance(model, str | Path):
        found = find_weights(Path(model).expanduser())
        model = load_folder(found)
        notes += assumptions(found)
    state = get_state(model)
    tokenizer = tokenizer if tokenizer is not None else state.tokenizer
    if tokenizer is None:
        raise UsageError("verify_export: no tokenizer is known for this model; pass tokenizer=")
    dtype = str(base_model(model).dtype).removeprefix("torch.")
    adapters = f", adapters {', '.join(model.peft_config)}" if getattr(model, "peft_config", None) else ""
    return model, tokenizer, f"{state.source or type(model).__name__} in {state.quant or dtype}{adapters}"


def artefacts_in(given: str | Path | Sequence[str | Path], notes: list[str]) -> list[Path]:
    """Return the files and folders to judge; GGUF files that are adapters are left out with a note.

    Raises `UsageError` with every path that is nothing to judge, and where nothing is left.
    """
    several = [Path(one).expanduser() for one in ([given] if isinstance(given, str | Path) else given)]
    problems = [problem for path in several if (problem := artefact_problem(path))]
    if problems:
        raise UsageError(*problems)
    found = [one for path in several for one in (_inside(path) if path.is_dir() else [path])]
    alone = [path for path in found if path.suffix == ".gguf" and _is_adapter_file(path)]
    notes += [
        f"{path.name} is an adapter, which runs beside its base's file only; it was not verified" for path in alone
    ]
    found = [path for path in found if path not in alone]
    if not found:
        expected = "a merged folder, an adapter's folder, the .gguf file of a whole model, or several"
        remedy = "The GGUF file of an adapter alone cannot be verified: it runs beside its base's file only."
        raise UsageError(Problem("artefact", [str(path) for path in alone] or given, expected, remedy if alone else ""))
    return found


def _inside(folder: Path) -> list[Path]:
    """Return what a folder is or holds: its own weights and GGUF files, or folders of either."""
    from fastft.train.checkpoint import checkpoints

    files = sorted(folder.glob("*.gguf"))
    if _has_weights(folder) or checkpoints(folder):
        return [folder, *files]
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    found = files + [one for path in folders for one in ([path] * _has_weights(path) + sorted(path.glob("*.gguf")))]
    return found or [folder]


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _is_adapter_file(path: Path) -> bool:
    from fastft.export.gguf.file import read_gguf

    try:
        return read_gguf(path).metadata.get("general.type") == "adapter"
    except LoadError:
        return False  # its turn to fail, with its reason, comes


def _unreadable(path: Path, error: FastftError) -> ArtefactReport:
    kind = "gguf" if path.suffix == ".gguf" else "folder"
    reasons = tuple(str(problem) for problem in error.problems)
    return ArtefactReport(str(path), kind, "-", None, None, None, None, None, reasons)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _without_adapters(model: Any, questions: Questions) -> list[Tensor]:
    """Return the logits of the model without its adapters; empty if it has none."""
    if not getattr(model, "peft_config", None):
        return []
    with model.disable_adapter():
        return [run_model(model, ids) for ids in questions.ids]


def _kl(first: Sequence[Tensor], second: Sequence[Tensor], questions: Questions) -> float:
    return distance(first, second, questions.ids, questions.text).kl


def _judge(
    path: Path,
    opened: Engine,
    tokenizer: Any,
    questions: Questions,
    expected: Sequence[Tensor],
    base: Sequence[Tensor],
    held: str,
) -> ArtefactReport:
    problems = list(opened.problems)
    same_prompts = _compare_prompts(opened, tokenizer, questions, problems)
    same_ids = _compare_ids(opened, tokenizer, questions, problems)
    outputs = [opened.logits(ids) for ids in questions.ids]
    return ArtefactReport(
        str(path),
        opened.kind,
        opened.runner,
        same_prompts,
        same_ids,
        distance(expected, outputs, questions.ids, questions.text),
        _kl(base, outputs, questions) if base else None,
        limits_of(opened.kind, held, opened.original),
        tuple(problems),
        opened.notes,
    )


def _compare_prompts(opened: Engine, tokenizer: Any, questions: Questions, problems: list[str]) -> bool | None:
    """Render the conversations with the artefact's own template."""
    pairs = zip(questions.conversations, questions.prompts, strict=True)
    asked = [(messages, ours) for messages, ours in pairs if not isinstance(messages, str)]
    if not getattr(tokenizer, "chat_template", None) or not asked:
        return None
    if not opened.template:
        problems.append("it carries no chat template, and the tokenizer of the training has one")
        return False
    other = copy.copy(tokenizer)
    other.chat_template = opened.template
    for messages, ours in asked:
        theirs = _rendered_or_error(other, messages)
        if theirs != ours:
            here, there = _excerpt(ours, theirs), _excerpt(theirs, ours)
            problems.append(f"its chat template renders {there!r} where that of the training renders {here!r}")
            return False
    return True


def _rendered_or_error(tokenizer: Any, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError

    try:
        return render(tokenizer, messages)
    except TemplateError as error:
        return f"an error: {error}"


def _excerpt(text: str, other: str) -> str:
    """Return the place where `text` begins to differ from `other`."""
    start = next((i for i, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
    return text[max(0, start - 20) : start + 40]


def _compare_ids(opened: Engine, tokenizer: Any, questions: Questions, problems: list[str]) -> bool | None:
    """Tokenise the rendered prompts, and the text with what a tokenizer puts before it."""
    if opened.encode is None:
        return None
    plain = [isinstance(asked, str) for asked in questions.conversations]
    asked = [*zip(questions.prompts, plain), (questions.passage[:2000], True)]
    for prompt, special in asked:
        ours = token_ids(tokenizer, prompt, special)
        theirs = opened.encode(prompt, special)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            problems.append(
                f"token {at} of {prompt[:40]!r} is {theirs[at : at + 3]} there and {ours[at : at + 3]} here"
            )
            return False
    return True


def _limited(report: ArtefactReport, limits: Limits | None, adapter_kl: float | None) -> ArtefactReport:
    """Hold a report against its limits; NaN is a failure."""
    found, problems, notes = report.distance, list(report.problems), list(report.notes)
    if not math.isfinite(found.largest_difference):
        problems.append("its logits hold NaN or infinity, or those of the model do")
    if limits is None:
        notes.append(f"there is no limit for {report.kind}: its logits were measured and not judged")
    else:
        if not found.kl <= limits.kl:
            problems.append("mean KL divergence {}, allowed {}".format(*_apart(found.kl, limits.kl, ".{}g", 3)))
        if not 1 - found.same_choice <= limits.other_choice:
            other = _apart(1 - found.same_choice, limits.other_choice, ".{}%", 1)
            problems.append("{} other first choices, allowed {}".format(*other))
        if not found.perplexity_rise <= limits.perplexity:
            rise = _apart(found.perplexity_rise, limits.perplexity, "+.{}%", 1)
            problems.append("perplexity {}, allowed {}".format(*rise))
        # an artefact without the adapters would be nearer to the base by about the adapters' own effect
        gap = 0.0 if report.base_kl is None else found.kl - report.base_kl
        if adapter_kl is not None and adapter_kl > limits.kl / 100 and gap > adapter_kl / 2:
            problems.append(
                f"it is nearer to the model without its adapters (KL {report.base_kl:.3g}) than to the trained one "
                f"({found.kl:.3g}): the adapter is missing in it, or not whole"
            )
        if adapter_kl is not None and found.kl > adapter_kl and not problems:
            notes.append(
                f"allowed for {report.kind}, but its rounding (KL {found.kl:.3g}) is more than all that the adapters "
                f"changed ({adapter_kl:.3g}): little of what was learnt may be left; take a finer quant"
            )
    return evolve(report, limits=limits, problems=tuple(problems), notes=tuple(notes))


def _apart(found: float, allowed: float, form: str, digits: int) -> tuple[str, str]:
    """Return both numbers in a `form` of so many digits, or of as many more as tell them apart."""
    pairs = ((format(found, form.format(d)), format(allowed, form.format(d))) for d in range(digits, 18))
    return next(pair for pair in pairs if pair[0] != pair[1])


def _same(value: bool | None) -> str:
    return "not tried" if value is None else "same" if value else "DIFFER"
