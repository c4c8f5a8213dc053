"""Put an exported folder on the model hub, with a model card made from its run's record. Only ever when asked."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from fastft.environment import hub_offline
from fastft.errors import LoadError, Problem, UsageError
from fastft.export.folder import run_record
from fastft.export.place import MARK, RECORD
from fastft.model import files
from fastft.train.card import facts
from fastft.train.checkpoint import write_text

CARD = "README.md"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The records name folders of the machine that they were made on; the card has what others can use of them.
_KEPT_BACK = ("run.json", RECORD, CARD, files.ADAPTER_CONFIG, ".*", "checkpoint-*", "*.partial", "trainer_state.json")


@frozen
class Pushed:
    """What `push` put on the hub."""

    url: str
    kind: str
    files: tuple[str, ...]


def push(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool = False,
    run: str | Path | None = None,
    base_model: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> Pushed:
    """Upload a merged, adapter or GGUF folder to the hub as `repo_id`; the repository is made if it is not there.

    * `token`: one that may write; by default the one that `hf auth login` keeps.
    * `run`: the folder of the run whose run.json the card is made from; by default that in the folder.
    * `base_model`: the base's name on the hub, for the card and, where it names a local folder, for the adapter.

    A README.md that the folder has is kept; otherwise the card is made, and written there. Before anything is sent,
    `UsageError` is raised, with all mistakes at once, for a folder without an export, a wrong `repo_id`, no token, or
    a hub that the user has switched off; `LoadError` if the hub does not answer or refuses the token; and `SaveError`
    if the card cannot be written.
    """
    folder = Path(folder).expanduser()
    kind, problems = _kind(folder)
    problems += _id_problems(repo_id)
    token, wrong = _token(token)
    config = files.read_json(folder / files.ADAPTER_CONFIG) if kind == "adapter" else {}
    base = base_model or _hub_name(config.get("base_model_name_or_path") or _exported(folder).get("base_model"))
    if kind == "adapter" and base is None:
        name = config.get("base_model_name_or_path")
        remedy = "Others cannot load the adapter otherwise."
        problems.append(Problem("base_model", None, f"the hub's name of the base, which here is {name!r}", remedy))
    problems += [*wrong, *_run_problems(run)]
    if problems:
        raise UsageError(*problems)
    record = files.read_json(Path(run).expanduser() / "run.json") if run else run_record(folder)
    api = _answering(token)
    card = _card(folder, repo_id, kind, base, record)
    return _send(api, folder, repo_id, kind, card, {**config, "base_model_name_or_path": base} if config else {}, {
        "private": private, "message": commit_message or f"Upload {kind} model", "revision": revision,
    })  # fmt: skip


def check_push(repo_id: str, token: str | None = None) -> None:
    """Raise what `push` would raise of the name, the token and the hub, before there is a folder to push."""
    problems: list[Problem | str] = [*_id_problems(repo_id)]
    token, wrong = _token(token)
    if problems or wrong:
        raise UsageError(*problems, *wrong)
    _answering(token)


def _id_problems(repo_id: Any) -> list[Problem]:
    right = isinstance(repo_id, str) and _ID.fullmatch(repo_id)
    return [] if right else [Problem("repo_id", repo_id, "'owner/name'")]


def _kind(folder: Path) -> tuple[str, list[Problem | str]]:
    if not folder.is_dir():
        return "", [Problem("folder", str(folder), "the folder of an export")]
    if list(folder.glob("*.gguf")):
        return "gguf", []
    kind = "adapter" if files.is_adapter(folder) else "merged"
    return kind, [f"{folder}: {problem}" for problem in files.problems_of(folder)]


def _token(token: str | None) -> tuple[str | None, list[str]]:
    from huggingface_hub import get_token

    problems = []
    if hub_offline():
        problems.append(
            "the model hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE); unset it to push, nothing was sent"
        )
    token = token or get_token()
    if not token:
        problems.append("there is no token for the hub: pass token=, or run `hf auth login` once; nothing was sent")
    return token, problems


def _run_problems(run: str | Path | None) -> list[Problem]:
    if run is None or (Path(run).expanduser() / "run.json").is_file():
        return []
    return [Problem("run", str(run), "the output_dir of a run, with its run.json")]


def _answering(token: str | None) -> Any:
    """Return the hub's API after it has said whose token this is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # of whichever HTTP library the client is built on

    api = HfApi(token=token)
    try:
        api.whoami()
    except HfHubHTTPError as error:
        raise LoadError(f"the hub refuses the token ({error}); make one that may write; nothing was sent") from error
    except (HTTPError, OSError) as error:  # the HTTP library's own are no OSErrors
        raise LoadError(
            f"the hub cannot be reached ({type(error).__name__}: {error}); check the network; nothing was sent"
        ) from error
    return api


def _send(
    api: Any,
    folder: Path,
    repo_id: str,
    kind: str,
    card: str,
    adapter_config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Pushed:
    from huggingface_hub.errors import HTTPError

    write_text(folder / CARD, card)
    where = {"repo_id": repo_id, "revision": options["revision"], "commit_message": options["message"]}
    try:
        url = api.create_repo(repo_id, private=options["private"], exist_ok=True)
        if options["revision"]:
            api.create_branch(repo_id, branch=options["revision"], exist_ok=True)
        api.upload_folder(folder_path=str(folder), ignore_patterns=list(_KEPT_BACK), **where)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, **where)
        if adapter_config:
            content = json.dumps(adapter_config, indent=2).encode()
            api.upload_file(path_or_fileobj=content, path_in_repo=files.ADAPTER_CONFIG, **where)
    except (HTTPError, OSError) as error:
        raise LoadError(
            f"{repo_id}: the upload failed ({type(error).__name__}: {error}); push again to go on"
        ) from error
    sent = sorted(path.name for path in folder.iterdir() if path.is_file() and not _is_kept_back(path.name))
    own = [CARD, *([files.ADAPTER_CONFIG] if adapter_config else [])]
    return Pushed(str(url), kind, tuple(sorted([*sent, *own])))


def _is_kept_back(name: str) -> bool:
    from fnmatch import fnmatch

    return any(fnmatch(name, pattern) for pattern in _KEPT_BACK)


def _exported(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


def _hub_name(name: Any) -> str | None:
    """Return a name if it is one of the hub and not a path of this machine."""
    known = isinstance(name, str) and _ID.fullmatch(name) and not Path(name).expanduser().exists()
    return name if known else None


def _card(folder: Path, repo_id: str, kind: str, base: str | None, record: Mapping[str, Any]) -> str:
    """Return the folder's own README.md, or the card that is made of the records."""
    path = folder / CARD
    if path.is_file():
        text = path.read_text("utf-8")
        # PEFT writes a form that nobody has filled in
        if MARK not in text and "[More Information Needed]" not in text:
            return text
    return made_card(folder, repo_id.rpartition("/")[2], kind, base, record)


def made_card(folder: Path, name: str, kind: str, base: str | None, record: Mapping[str, Any]) -> str:
    """Return a model card: metadata for the hub, what was exported, and the facts of the run if they are known."""
    library = {"adapter": "peft", "gguf": "gguf", "merged": "transformers"}[kind]
    relation = {"adapter": "adapter", "gguf": "quantized", "merged": "finetune"}[kind]
    head = ["---", f"library_name: {library}"]
    head += [f"base_model: {base}", f"base_model_relation: {relation}"] if base else []
    head += ["tags:", "- fastft", *(["- gguf"] if kind == "gguf" else []), "---", ""]
    exported = _exported(folder)
    rows: list[tuple[str, Any]] = [("kind", kind)]
    rows += [("precision", exported.get("precision")), ("merged into", _merged_into(exported))]
    rows += [("file", f"{path.name}, {path.stat().st_size / 1e9:.2f} GB") for path in sorted(folder.glob("*.gguf"))]
    rows += [(label, _shown(label, value, base)) for label, value in facts(record)] if record else []
    table = [f"| {label} | {value} |" for label, value in rows if value not in (None, "")]
    versions = ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items() if value)
    end = ["", f"Versions: {versions}."] if versions else []
    return "\n".join([*head, f"# {name}, {MARK}", "", "| | |", "|---|---|", *table, *end, ""])


def _shown(label: str, value: Any, base: str | None) -> Any:
    """Return a fact as others may read it: the base by its name on the hub, or by the last part of its path."""
    return (base or Path(str(value)).name) if label == "base model" else value


def _merged_into(exported: Mapping[str, Any]) -> str | None:
    if "base" not in exported:
        return None
    quant = exported.get("quant")
    held = f"the {quant} weights that training saw, dequantised" if quant else "the weights that training saw"
    return held if exported["base"] == "dequantised" else "the original 16-bit weights"
