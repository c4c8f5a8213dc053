"""Loading: what comes out is what lies on disk, and everything wrong on disk is named."""

import json
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastft.cli.plan import read_config
from fastft.data.preview import preview
from fastft.errors import LoadError, UsageError
from fastft.model import files
from fastft.model.adapters import add_lora
from fastft.model.load import describe, load
from fastft.state import get_state

FAMILIES = ["llama", "qwen2", "gemma3", "phi3"]
IDS = torch.tensor([[1, 7, 20, 33, 150, 260, 9, 12, 40, 77]])


def reference(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", [None, "100KB"])
def test_logits_are_those_of_transformers(tiny, family, shard):
    folder = tiny(family, shard=shard)
    assert (folder / "model.safetensors.index.json").exists() == bool(shard)
    model, tokenizer = load(folder, dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(folder)(IDS).logits)
    state = get_state(model)
    assert (state.source, state.quant, state.full, state.max_length) == (str(folder), None, False, 128)
    assert state.tokenizer is tokenizer and tokenizer.padding_side == "left" and tokenizer.model_max_length == 128
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.model_type in state.spec.model_types


def test_full_trains_every_weight(tiny):
    model, _ = load(tiny("gemma3"), full=True, dtype="float32")
    assert all(p.requires_grad for p in model.parameters()) and get_state(model).full


def test_dtype_and_default_dtype(tiny):
    folder = tiny()
    for name, dtype in (("bf16", torch.bfloat16), (torch.float16, torch.float16), ("torch.float32", torch.float32)):
        assert load(folder, dtype=name)[0].dtype == dtype
    from fastft.model.config import choose_dtype

    assert load(folder)[0].dtype == choose_dtype(None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_is_the_dequantised_model(tiny, family, rms):
    """The 4-bit model computes as the one whose weights were dequantised; its bits come from the 16-bit weights."""
    import bitsandbytes as bnb

    folder = tiny(family)
    model, _ = load(folder, quant="nf4", dtype="float32")
    ref = reference(folder)
    stored = {n: p.detach().clone() for n, p in ref.named_parameters()}
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
            assert 0.02 < rms(weight, stored[f"{name}.weight"]) < 0.15
            ref.get_submodule(name).weight.data.copy_(weight)
            count += 1
    assert count == {"phi3": 8}.get(family, 14)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    with torch.no_grad():
        assert rms(model(IDS).logits, ref(IDS).logits) < 2e-6
    assert get_state(model).quant == "nf4"


def test_int8_is_near_and_keeps_the_head(tiny, rms):
    import bitsandbytes as bnb

    folder = tiny("qwen2")
    model, _ = load(folder, quant="int8", dtype="float32")
    assert sum(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules()) == 14
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    with torch.no_grad():
        assert 1e-4 < rms(model(IDS).logits, reference(folder)(IDS).logits) < 0.1


def test_stored_nf4_is_taken_as_it_is(tiny, tmp_path, rms):
    model, tokenizer = load(tiny(), quant="nf4", dtype="float32")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, dtype="float32")
    assert get_state(again).quant == "nf4" and "stored quantised" in describe(again)
    with torch.no_grad():
        assert rms(again(IDS).logits, model(IDS).logits) < 1e-6
    with pytest.raises(UsageError, match="stored as nf4 already"):
        load(tmp_path, quant="int8")
    with pytest.raises(UsageError, match="cannot be trained"):
        load(tmp_path, full=True)


@pytest.mark.parametrize(
    ("device", "there", "told"),
    [
        ("cuda", 0, "device: expected 'cpu' or None, as torch finds no CUDA device here, got 'cuda'. Leave it out"),
        ("cuda:2", 2, "device: expected one of cuda:0, cuda:1, got 'cuda:2'"),
        ("gpu", 2, "device: expected None, 'auto', 'cpu', 'cuda', 'cuda:0' ..., got 'gpu'"),
    ],
)
def test_a_device_that_is_not_there(device, there, told, monkeypatch):
    from fastft.export.gguf.export import export_gguf

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(UsageError) as caught:
        load("no/where", device=device, max_length=0)
    assert len(caught.value.problems) == 2 and told in str(caught.value)
    with pytest.raises(UsageError, match="export_gguf device: expected"):
        export_gguf("no/where", device=device)


def test_missing_model_says_where_was_looked(tmp_path):
    with pytest.raises(LoadError) as caught:
        load("nobody/no-such-model")
    text = str(caught.value)
    for part in ("'nobody/no-such-model'", "no folder", "hub cache", "HF_HUB_OFFLINE", "local folder"):
        assert part in text
    with pytest.raises(LoadError, match=r"no such folder .* no hub id"):
        load(tmp_path / "absent")


def test_hub_cache_needs_no_network(tiny, tmp_path):
    folder = tiny()
    repo = tmp_path / "models--team--small"
    shutil.copytree(folder, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    model, _ = load("team/small", dtype="float32", cache_dir=str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(folder)(IDS).logits)
    assert get_state(model).source == "team/small" == model.config._name_or_path
    (repo / "snapshots" / "abc" / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"incomplete .*model\.safetensors.*HF_HUB_OFFLINE"):
        load("team/small", cache_dir=str(tmp_path))


DAMAGES = ["truncated", "garbage", "shard", "index", "index json", "swapped", "tokenizer", "tokenizer json"]
DAMAGES += ["config", "config json", "unknown type", "more layers"]


def damage(folder, what):
    shards = sorted(folder.glob("model-*.safetensors"))
    if what == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
        return f"{shards[1].name} is damaged"
    if what == "garbage":
        shards[0].write_bytes(b"\xff" * 64)
        return f"{shards[0].name} is damaged"
    if what == "shard":
        shards[1].unlink()
        return f"{shards[1].name} is missing, which model.safetensors.index.json names"
    if what == "index":
        (folder / "model.safetensors.index.json").unlink()
        return "model.safetensors.index.json is missing"
    if what == "index json":
        (folder / "model.safetensors.index.json").write_text("{")
        return "model.safetensors.index.json: not valid JSON"
    if what == "swapped":
        shards[1].write_bytes(shards[0].read_bytes())
        return f"{shards[1].name} lacks"
    if what == "tokenizer":
        (folder / "tokenizer.json").unlink()
        return "no tokenizer (tokenizer.json"
    if what == "tokenizer json":
        (folder / "tokenizer.json").write_text("{}")
        return "its tokenizer cannot be loaded"
    if what == "config":
        (folder / "config.json").unlink()
        return "config.json is missing"
    if what == "config json":
        (folder / "config.json").write_text("{'a': 1}")
        return "config.json: not valid JSON"
    if what == "unknown type":
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stored, "model_type": "llamb"}))
        return "model type 'llamb'"
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "num_hidden_layers": 3}))
    return "tensors of the model are not in the checkpoint, such as model.layers.2"


@pytest.mark.parametrize(
    "what",
    DAMAGES,
)
def test_damaged_folder_is_one_clear_error(tiny, what):
    folder = tiny(shard="100KB")
    expected = damage(folder, what)
    with pytest.raises(LoadError) as caught:
        load(folder)
    assert expected in str(caught.value) and str(folder) in str(caught.value)


def test_several_damages_are_told_together(tiny):
    folder = tiny(shard="100KB")
    expected = [damage(folder, what) for what in ("truncated", "tokenizer", "config")]
    with pytest.raises(LoadError) as caught:
        load(folder)
    assert len(caught.value.problems) == 3 and all(text in str(caught.value) for text in expected)


def test_code_of_a_model_is_not_run_unasked(tiny):
    folder = tiny()
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(LoadError, match="trust_remote_code=True"):
        load(folder)


def test_unknown_architecture_is_noted(tiny, tmp_path):
    import transformers as t

    config = t.GPTNeoXConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    t.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    for path in tiny().glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    model, _ = load(tmp_path, quant="nf4")
    assert get_state(model).spec is None and "no spec for the architecture 'gpt_neox'" in describe(model)
    assert model.get_output_embeddings().weight.is_floating_point()


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_adapter_folder(tiny, tmp_path, family, rms):
    from fastft.model.adapters import add_lora

    base = tiny(family)
    model, _ = load(base, dtype="float32")
    model = add_lora(model, r=4, init=False)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS).logits
    again, _ = load(tmp_path / "adapter", dtype="float32")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
        assert rms(expected, reference(base)(IDS).logits) > 1e-2
    trainable = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad} and trainable
    assert get_state(again).source == str(base) and "the adapter of" in describe(again)
    # the base beside the adapter, named by a relative path
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**stored, "base_model_name_or_path": "../base"})
    )
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "adapter", dtype="float32")[0](IDS).logits, expected)
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**stored, "base_model_name_or_path": "/gone/base"})
    )
    with pytest.raises(LoadError, match="base model is not at /gone/base any more"):
        load(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(LoadError, match=r"adapter_model\.safetensors is damaged"):
        load(tmp_path / "adapter")
    with pytest.raises(UsageError, match="is an adapter"):
        load(tmp_path / "adapter", full=True)


def test_loading_leaves_the_random_state(tiny):
    before = torch.get_rng_state()
    load(tiny(), quant="nf4")
    assert torch.equal(before, torch.get_rng_state())


def answer(status):
    """Return what the hub's client reads of an HTTP response, whichever HTTP library it is built on."""
    request = SimpleNamespace(method="GET", url="https://hub.invalid/team/small", headers={})
    return SimpleNamespace(status_code=status, headers={}, request=request, url=request.url, text="", reason_phrase="")


@pytest.fixture
def online(monkeypatch):
    """The hub is switched on, and knows every model that it is asked for."""
    import huggingface_hub
    import transformers.utils.hub  # noqa: F401  it takes the client's class at its import, not what stands for it here

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    known = SimpleNamespace(model_info=lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: known)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("GatedRepoError", 403, "access is gated; accept its terms"),
        ("RepositoryNotFoundError", 404, "not on the hub; check the spelling, or pass token="),
        ("RevisionNotFoundError", 404, "the hub has the model but not this revision"),
        ("LocalEntryNotFoundError", None, "the hub could not be reached"),
        ("HfHubHTTPError", 503, "the hub could not be reached"),
    ],
)
def test_what_the_hub_says_is_passed_on(tiny, online, monkeypatch, error, status, message):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(repo, local_files_only, **_):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        raise kind("no", response=answer(status)) if status else kind("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(LoadError) as caught:
        load("team/small", revision="v9")
    assert message in str(caught.value) and "'team/small' at revision 'v9'" in str(caught.value)


def test_the_network_is_asked_only_for_what_is_not_cached(tiny, online, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, asked, cached = tiny(), [], [False]

    def download(repo, local_files_only, allow_patterns, **_):
        asked.append(local_files_only)
        assert "*.py" not in allow_patterns
        if local_files_only and not cached[0]:
            raise LocalEntryNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load("team/small")
    assert asked == [True, False]
    cached[0] = True
    load("team/small")
    assert asked == [True, False, True]


@pytest.mark.parametrize("part", ["tokenizer", "model"])
def test_a_lone_tokenizer_json_is_no_whole_copy_of_a_tokenizer(part, tiny, online, monkeypatch, tmp_path):
    """It is what other libraries fetch by itself: special tokens and the chat template are in other files."""
    import huggingface_hub

    folder, asked = tiny(), []
    for name in ("tokenizer.json", "config.json", files.WEIGHTS):
        shutil.copy(folder / name, tmp_path)
    files.check(tmp_path)  # as a folder of the user's own it is whole

    def download(repo, local_files_only, **_):
        asked.append(local_files_only)
        return str(tmp_path if local_files_only else folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert files.locate("team/small", part=part) == folder and asked == [True, False]
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    assert files.locate("team/small", part=part) == tmp_path and asked == [True, False, True]
    (tmp_path / "tokenizer_config.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=r"\(tokenizer.json alone, no tokenizer_config.json\).*HF_HUB_OFFLINE"):
        files.locate("team/small", part=part)


@pytest.mark.parametrize("there", [["tekken.json"], ["tokenizer.model"], ["tokenizer.json", "vocab.json"]], ids=str)
def test_a_repository_without_tokenizer_config_is_read_offline(there, online, monkeypatch, tmp_path):
    """Some have none: what lies in the cache is all of it, and no hub has more."""
    import huggingface_hub

    for name in there:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert files.locate("team/small", part="tokenizer") == tmp_path


@pytest.fixture
def silent_hub(monkeypatch):
    """The hub takes a connection and never answers; at most a moment is waited for it."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(files, "SECONDS", 0.3)
        yield


def test_a_hub_that_does_not_answer_is_not_waited_for(silent_hub, tmp_path, monkeypatch):
    """Neither for a model, nor for its tokenizer or its config alone; a name like it that is here is named."""
    (tmp_path / "runs" / "my-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for ask in (load, lambda name: preview([{"text": "w1"}], name), read_config):
        began = time.monotonic()
        with pytest.raises(LoadError, match=r"did you mean 'runs/my-model'\?.*hub could not be reached"):
            ask("runs/my-modl")
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["./my-modl", "../{here}/my-modl", "{path}/my-modl", "my-model.gguf", "a/b/c"])
def test_what_can_be_no_name_of_the_hub_is_not_asked_for(name, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "my-model").mkdir()
    for ask in (load, lambda name: preview([{"text": "w1"}], name), read_config):
        with pytest.raises(LoadError, match="no hub id") as caught:
            ask(name.format(path=tmp_path, here=tmp_path.name))
        assert ("my-model'?" in str(caught.value)) is (name != "a/b/c")


def test_a_wrong_id_is_no_crash():
    with pytest.raises(LoadError, match="no hub id"):
        load("a..b/c")


def test_describe(tiny):
    from fastft.model.adapters import add_lora

    folder = tiny()
    model = add_lora(load(folder, quant="nf4", dtype="float32")[0], r=4)
    total = sum(p.numel() for p in reference(folder).parameters())
    adapter = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    lines = describe(model).splitlines()
    assert lines[0].startswith(str(folder)) and lines[0].endswith(f" {total + adapter:,} parameters")
    assert "nf4, on cpu" in lines[1] and f"{adapter:,} " in lines[2] and "128 tokens" in lines[3]
    assert "'<unk>' (id 0) now pads" in lines[4]


def test_an_adapter_with_weights_missing_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = add_lora(load(tiny())[0], r=4)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(LoadError, match="1 tensors of the ada"),
    ):
        load(tmp_path)


def test_importing_bitsandbytes_prints_nothing(tiny):
    """In a process of its own, since a module is imported once."""
    import subprocess
    import sys

    code = f"import fastft; m, t = fastft.load({str(tiny())!r}); fastft.add_lora(m, r=4); import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kernels" not in done.stderr + done.stdout


def test_a_folder_has_no_revision(tiny):
    with pytest.raises(UsageError) as caught:
        load(tiny(), revision="v9", dtype="int3")
    assert [problem.where for problem in caught.value.problems] == ["revision", "dtype"]
    assert "revision: expected None for a folder, got 'v9'" in str(caught.value)
