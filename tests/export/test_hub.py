"""push: everything is checked before anything is sent, and what is sent names no folder of this machine."""

import json

import pytest
from huggingface_hub.errors import HTTPError

from fastft.errors import LoadError, SaveError, UsageError
from fastft.export import hub
from fastft.export.hub import push
from fastft.export.merge import merge, save_adapter


class Api:
    """Stands in for the hub's API and keeps what it is told."""

    sent: list

    def __init__(self, token=None):
        self.token = token

    def whoami(self):
        self.sent.append(("whoami", self.token))

    def create_repo(self, repo_id, private, exist_ok):
        self.sent.append(("create_repo", repo_id, private))
        return f"https://hub.example/{repo_id}"

    def create_branch(self, repo_id, branch, exist_ok):
        self.sent.append(("create_branch", branch))

    def upload_folder(self, folder_path, ignore_patterns, **where):
        self.sent.append(("upload_folder", folder_path, tuple(ignore_patterns), where))

    def upload_file(self, path_or_fileobj, path_in_repo, **where):
        self.sent.append(("upload_file", path_in_repo, path_or_fileobj.decode()))


@pytest.fixture
def online(monkeypatch):
    import huggingface_hub

    api = type("Kept", (Api,), {"sent": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "hub_offline", lambda: False)
    return api


RECORD = {
    "status": "finished", "steps": 3, "seed": 1, "model": {"name": "/home/someone/llama", "quant": "nf4"},
    "loss": {"first": 2.0, "last": 1.0}, "versions": {"torch": "2.13.0"},
}  # fmt: skip


def test_nothing_is_sent_without_hub_token_or_export(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: pytest.fail("the hub was asked"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "hub_offline", lambda: True)
    with pytest.raises(UsageError) as caught:
        push(tmp_path, "no owner", run=tmp_path)
    text = str(caught.value)
    assert "config.json is missing" in text
    assert "repo_id: expected 'owner/name'" in text
    assert "switched off" in text
    assert "there is no token" in text
    assert "run: expected the output_dir" in text
    with pytest.raises(UsageError, match="the folder of an export"):
        push(tmp_path / "absent", "owner/name")


def test_merged_folder(adapted, tmp_path, online):
    model, _ = adapted("nf4")
    merge(model, tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(RECORD))
    pushed = push(tmp_path / "out", "me/mine", token="secret", private=True, run=tmp_path / "run", revision="v1")
    assert online.sent[0] == ("whoami", "secret")
    assert online.sent[1] == ("create_repo", "me/mine", True)
    assert online.sent[2] == ("create_branch", "v1")
    kind, folder, ignored, where = online.sent[3]
    assert (kind, folder, where["repo_id"]) == ("upload_folder", str(tmp_path / "out"), "me/mine")
    assert {"run.json", "export.json"} <= set(ignored)
    assert pushed.kind == "merged"
    assert pushed.url == "https://hub.example/me/mine"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(pushed.files)
    assert "export.json" not in pushed.files
    card = online.sent[4][2]
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- fastft\n---\n\n# mine, exported with fastft")
    assert "| base model | llama |" in card
    assert "/home/someone" not in card
    assert "| precision | bf16 |" in card
    assert "| merged into | the nf4 weights that training saw, dequantised |" in card
    assert "| loss, first to last | 2.0000 to 1.0000 |" in card
    assert "Versions: torch 2.13.0." in card


def test_an_adapter_names_its_base_as_the_hub_does(adapted, tmp_path, online):
    model, _ = adapted()
    save_adapter(model, tmp_path / "out")
    with pytest.raises(UsageError, match=r"base_model: .*the hub's name of the base"):
        push(tmp_path / "out", "me/mine", token="t")
    assert online.sent == []
    pushed = push(tmp_path / "out", "me/mine", token="t", base_model="them/base")
    name, sent = online.sent[-1][1:]
    assert name == "adapter_config.json"
    assert json.loads(sent)["base_model_name_or_path"] == "them/base"
    kept = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert kept != "them/base"  # the folder still loads here
    assert "adapter_config.json" in online.sent[2][2]
    card = online.sent[-2][2]
    assert "base_model: them/base\nbase_model_relation: adapter\n" in card
    assert "More Information Needed" not in card  # the form that PEFT leaves is no card
    assert "adapter_model.safetensors" in pushed.files


def test_gguf_folder_and_a_readme_of_ones_own(tmp_path, online):
    (tmp_path / "m-q4_k_m.gguf").write_bytes(b"GGUF" * 100)
    (tmp_path / "Modelfile").write_text("FROM ./m-q4_k_m.gguf\n")
    pushed = push(tmp_path, "me/mine", token="t", base_model="them/base")
    assert pushed.kind == "gguf"
    assert set(pushed.files) == {"m-q4_k_m.gguf", "Modelfile", "README.md"}
    card = online.sent[-1][2]
    assert "- gguf" in card
    assert "| file | m-q4_k_m.gguf, 0.00 GB |" in card
    (tmp_path / "README.md").write_text("# My own words\n")
    push(tmp_path, "me/mine", token="t")
    assert online.sent[-1][2] == "# My own words\n"
    assert (tmp_path / "README.md").read_text() == "# My own words\n"


def test_a_card_that_cannot_be_written_sends_nothing(tmp_path, online):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").mkdir()
    with pytest.raises(SaveError, match=r"README\.md: could not be written"):
        push(tmp_path, "me/mine", token="t")
    assert [told[0] for told in online.sent] == ["whoami"]


@pytest.mark.parametrize("error", [ConnectionError, HTTPError, TimeoutError])
def test_a_hub_that_does_not_answer(error, tmp_path, online, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    def refuse(self):
        raise error("no route")

    monkeypatch.setattr(online, "whoami", refuse)
    with pytest.raises(LoadError, match=r"cannot be reached.*nothing was sent"):
        push(tmp_path, "me/mine", token="t")
    assert online.sent == []
    assert not (tmp_path / "README.md").exists()

    def full(self, **_):
        raise error("broken pipe")

    monkeypatch.setattr(online, "whoami", lambda self: None)
    monkeypatch.setattr(online, "upload_folder", full)
    with pytest.raises(LoadError, match="push again to go on"):
        push(tmp_path, "me/mine", token="t")
