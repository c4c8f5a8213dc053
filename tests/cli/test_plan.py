"""`fastft plan`: what it prints and its exit codes, from a config.json alone and without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import fastft
from fastft.cli.main import app, main

LLAMA_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def told(capsys, *arguments):
    code = main(["plan", *map(str, arguments)])
    return code, capsys.readouterr()


def test_options_are_frozen():
    command = typer.main.get_command(app).get_command(None, "plan")
    names = sorted(name for parameter in command.params for name in parameter.opts)
    assert names == [
        "--batch", "--compute", "--full", "--gpu", "--json", "--length", "--optimizer", "--plan", "--quant", "--rank",
        "model",
    ]  # fmt: skip


def test_weights_that_stay_dequantised_are_told(folder, capsys):
    code, out = told(capsys, folder, "--gpu", "H200", "--length", 4096, "--batch", 2, "--plan", "fast")
    assert code == 0 and "32 layers keep, weights dequantised" in out.out and "weights dequantised    13.96" in out.out
    _, out = told(capsys, folder, "--gpu", "H200", "--length", 4096, "--batch", 2, "--plan", "fast", "--json")
    found = json.loads(out.out)
    assert found["modes"][0] == {"level": "keep", "offload": False, "dequantised": True}
    assert found["time_relative_to_keep"] < 1


def test_weights_that_stay_in_fp8_are_told(folder, capsys):
    given = (folder, "--gpu", "H200", "--length", 4096, "--batch", 2, "--plan", "fast", "--compute", "fp8")
    code, out = told(capsys, *given)
    assert code == 0 and "32 layers keep, weights in fp8\n" in out.out and "weights in fp8         13.96" in out.out
    found = json.loads(told(capsys, *given, "--json")[1].out)
    assert found["layers"] == "32 layers keep, weights in fp8" and found["notes"] == []


@pytest.mark.parametrize("arguments", [("--quant", "none"), ("--quant", "fp8", "--compute", "fp8")])
def test_a_plan_that_is_another_says_so(arguments, folder, capsys):
    given, why = (folder, "--gpu", "H200", *arguments, "--plan"), "no layer has NF4 weights under an adapter"
    said = f"no weight is kept dequantised, plan 'fast' is 'keep': {why}"
    _, out = told(capsys, *given, "fast")
    assert said in out.out and "32 layers keep\n" in out.out
    _, out = told(capsys, *given, "fast", "--json")
    assert json.loads(out.out)["notes"] == [said]
    for plan in ("keep", "100GB"):
        _, out = told(capsys, *given, plan, "--json")
        assert json.loads(out.out)["notes"] == []
    _, out = told(capsys, folder, "--gpu", "H200", "--plan", "fast", "--json")
    assert json.loads(out.out)["notes"] == []


def test_what_fits_is_told_in_a_table_and_as_json(folder, capsys):
    code, out = told(capsys, folder, "--gpu", "24GB", "--length", 8192)
    assert code == 0 and all(word in out.out for word in ("weights", "5.70", "longest length", "1 x 8192 tokens, nf4"))
    code, out = told(capsys, folder, "--gpu", "24GB", "--length", 8192, "--json")
    found = json.loads(out.out)
    assert code == 0 and found["fits"] and found["remedies"] == [] and len(found["modes"]) == 32
    assert sum(part["bytes"] for part in found["parts"]) == found["peak_bytes"] <= found["budget_bytes"] < 24e9
    assert found["longest_length"] > 8192 and found["step_seconds"] is None
    code, out = told(capsys, folder, "--gpu", "24GB", "--length", found["longest_length"] + 256, "--json")
    assert code == 2


def test_the_smaller_of_memorys_and_the_models_length_is_told_with_its_name(tmp_path, capsys):
    lengths = {}
    for limit in (8192, 1 << 20):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "max_position_embeddings": limit}))
        for plan in ("auto", "keep"):
            given = (str(tmp_path), "--gpu", "24GB", "--plan", plan, "--length", 4096)
            code, out = told(capsys, *given)
            found = json.loads(told(capsys, *given, "--json")[1].out)
            room = lengths[plan] = found["longest_length_in_memory"]
            assert code == 0 and found["longest_length_of_model"] == limit
            assert found["longest_length"] == min(room, limit)
            by = f"about {room}, by memory; the model goes to {limit}\n"
            if limit < room:
                by = f"{limit}, by the model (max_position_embeddings); memory goes to about {room}\n"
            assert f"longest length: {by}" in out.out
    assert lengths["keep"] < 8192 < lengths["auto"] < 1 << 20  # so that either bounds one


def test_the_page_shows_what_is_printed(tmp_path, capsys):
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    config = {**LLAMA_8B, "max_position_embeddings": 131072, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, out = told(capsys, tmp_path, "--gpu", "24GB", "--length", 8192)
    page = (Path(__file__).parents[2] / "docs/how-to/fit-a-gpu.md").read_text()
    assert "```text\nmodel:  meta-llama/Llama-3.1-8B\n" + out.out.split("\n", 1)[1] + "```" in page
    _, out = told(capsys, tmp_path, "--gpu", "24GB", "--plan", "keep", "--batch", 4)
    start = out.out.index("WHAT IS ENOUGH")
    assert f"```text\n{out.out[start:]}```" in page


def test_rows_longer_than_the_models_positions_have_a_note(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "max_position_embeddings": 4096}))
    _, out = told(capsys, tmp_path, "--gpu", "H200", "--length", 8192)
    said = "the model goes to 4096 tokens (max_position_embeddings), fewer than 8192: fastft.load with max_length=8192"
    assert said in out.out
    assert "max_length" not in told(capsys, tmp_path, "--gpu", "H200", "--length", 4096)[1].out


def test_whose_limit_the_memory_is_is_told(folder, capsys):
    code, out = told(capsys, folder, "--gpu", "H200", "--plan", "10GB", "--length", 512)
    assert code == 0 and "10.00 GB, the budget of plan 10GB\n" in out.out and "H200 has" not in out.out
    code, out = told(capsys, folder, "--gpu", "H200", "--plan", "5GB")
    assert code == 2 and "with this plan; there are 5.00 GB, the budget of plan 5GB" in out.err
    code, out = told(capsys, folder, "--gpu", "8GB", "--plan", "8GB", "--batch", 8)
    assert code == 2 and "GB that 8GB has for it" in out.out and "GB that 8GB has for it" in out.err


def test_fp8_and_8_bits_are_timed_beside_the_exact_step(folder, capsys):
    speeds = {}
    for arguments in ((), ("--compute", "fp8"), ("--plan", "keep+8bit")):
        _, out = told(capsys, folder, "--gpu", "H200", "--batch", 4, "--plan", "keep", *arguments)
        speeds[arguments[-1:]] = out.out.split(" times as long as with everything kept and exact")[0][-4:]
    assert speeds == {(): "1.00", ("fp8",): "0.75", ("keep+8bit",): "1.01"}
    assert "32 layers keep (gate and up in 8 bits, not exact)\n" in out.out


def test_what_cannot_fit_has_exit_code_2_and_what_is_enough(folder, capsys):
    given = (folder, "--gpu", "16GB", "--quant", "none")
    code, out = told(capsys, *given)
    assert code == 2 and "check failed" in out.err
    assert out.out.endswith(
        'WHAT IS ENOUGH BY ITSELF  PEAK GB\nquant="nf4"               14.34\nsmallest known GPU: L4 (23.6 GB)\n'
    )  # of length 2048, rank 8 and an 8-bit optimizer none is
    found = json.loads(told(capsys, *given, "--json")[1].out)
    assert [remedy["name"] for remedy in found["remedies"]] == ['quant="nf4"']
    assert found["remedies"][0]["peak_bytes"] <= found["budget_bytes"] and found["remedies_together"] is None
    assert told(capsys, folder, "--gpu", "16GB", "--quant", "nf4")[0] == 0


def test_what_is_enough_is_so_when_it_is_asked_for(folder, capsys):
    given = ("--gpu", "24GB", "--plan", "keep", "--batch", "4", "--length", "4096")
    code, out = told(capsys, folder, *given, "--json")
    found = json.loads(out.out)
    assert code == 2 and [(remedy["name"], remedy["peak_bytes"]) for remedy in found["remedies"]] == [
        ('plan="auto"', 22_173_174_177),
        ("batch size 1 with 4 times the accumulation", 19_401_999_360),
        ("length 1024", 19_401_999_360),
    ]
    assert found["smallest_gpu"]["name"] == "H100 PCIe" and found["longest_length"] == 1024
    for option, value, milder in (("--plan", "auto", "keep"), ("--batch", "1", "2"), ("--length", "1024", "1280")):
        for tried, fits in ((value, 0), (milder, 2)):
            assert told(capsys, folder, *given, option, tried)[0] == fits
    for gpu, fits in (("H100 PCIe", 0), ("A6000", 2)):
        assert told(capsys, folder, *given, "--gpu", gpu)[0] == fits


def test_where_nothing_is_enough_by_itself_what_is_together_is_told(folder, capsys):
    given = (folder, "--gpu", "12GB", "--plan", "keep", "--quant", "none", "--batch", 6)
    code, out = told(capsys, *given)
    together = 'plan="auto", batch size 3 with twice the accumulation, quant="nf4"'
    assert code == 2 and "enough by itself:   nothing\n" in out.out
    assert f"enough together:    {together} (peak 10.06 GB)\n" in out.out
    found = json.loads(told(capsys, *given, "--json")[1].out)
    assert found["remedies"] == [] and ", ".join(found["remedies_together"]["names"]) == together
    assert told(capsys, folder, "--gpu", "12GB", "--batch", 3)[0] == 0
    code, out = told(capsys, folder, "--gpu", "5GB")
    assert code == 2 and out.out.endswith(
        "enough by itself:   nothing\nenough together:    nothing\nsmallest known GPU: RTX 3080 (10.3 GB)\n"
    )
    given = (folder, "--gpu", "H100", "--full", "--quant", "none", "--plan", "min", "--batch", 16, "--length", 32768)
    assert "smallest known GPU: none fits\n" in told(capsys, *given)[1].out


def test_a_low_rank_and_a_very_short_length_are_tried_before_nothing_is_enough(folder, capsys):
    for given, names in (
        (("--gpu", "7.4GB"), ["an 8-bit optimizer (adamw_8bit)", "rank 4", "length 256"]),
        (("--gpu", "7.4GB", "--length", 200), ["an 8-bit optimizer (adamw_8bit)", "rank 4"]),
        (("--gpu", "7.35GB"), ["an 8-bit optimizer (adamw_8bit)", "rank 4", "length 128"]),
    ):
        found = json.loads(told(capsys, folder, *given, "--json")[1].out)
        assert found["remedies"] == [] and found["remedies_together"]["names"] == names
    taken = (folder, "--optimizer", "adamw_8bit", "--rank", 4, "--length")
    assert [told(capsys, *taken, length, "--gpu", "7.4GB")[0] for length in (256, 512)] == [0, 2]
    assert [told(capsys, *taken, length, "--gpu", "7.35GB")[0] for length in (128, 256)] == [0, 2]


def test_beside_a_drastic_change_milder_ones_together_are_told(folder, capsys):
    given = (folder, "--gpu", "24GB", "--plan", "min", "--batch", 16, "--length", 8192)
    found = json.loads(told(capsys, *given, "--json")[1].out)
    assert [remedy["name"] for remedy in found["remedies"]] == [
        "batch size 4 with 4 times the accumulation", "length 2048"
    ]  # fmt: skip
    together = 'plan="auto", batch size 8 with twice the accumulation'
    assert ", ".join(found["remedies_together"]["names"]) == together
    _, out = told(capsys, *given)
    assert "length 2048  " in out.out and f"enough together:    {together} (peak " in out.out
    assert told(capsys, folder, "--gpu", "24GB", "--batch", 8, "--length", 8192)[0] == 0
    # one that is mild is enough
    _, out = told(capsys, folder, "--gpu", "8.5GB")
    assert "rank 8  " in out.out and "enough together" not in out.out


def test_a_longest_length_below_a_step_of_256_is_told_to_the_token(folder, capsys):
    given = (folder, "--gpu", "7.35GB", "--optimizer", "adamw_8bit", "--rank", 4)
    length = json.loads(told(capsys, *given, "--json")[1].out)["longest_length"]
    assert length == 199
    assert [told(capsys, *given, "--length", tried)[0] for tried in (length, length + 1)] == [0, 2]


def test_a_larger_budget_is_told_where_the_gpu_has_it(folder, capsys):
    given = (folder, "--gpu", "A100", "--length", 20000, "--plan")
    code, out = told(capsys, *given, "8GB+8bit", "--json")
    assert code == 2 and json.loads(out.out)["remedies"][0]["name"] == 'plan="10.10GB+8bit"'
    assert [told(capsys, *given, plan)[0] for plan in ("10.09GB+8bit", "10.10GB+8bit")] == [2, 0]


def test_a_known_gpu_gives_a_time_and_a_named_plan_is_taken(folder, capsys):
    found = {}
    for plan in ("keep", "min", "offload", "12GB"):
        code, out = told(capsys, folder, "--gpu", "H200", "--batch", 4, "--plan", plan, "--json")
        found[plan] = json.loads(out.out)
        assert code == 0
    assert found["keep"]["step_seconds"] < found["offload"]["step_seconds"] < found["min"]["step_seconds"]
    assert found["keep"]["peak_bytes"] > found["min"]["peak_bytes"] > found["offload"]["peak_bytes"]
    assert found["12GB"]["peak_bytes"] <= 12e9 and found["12GB"]["budget_bytes"] == 12e9
    assert found["min"]["layers"] == "32 layers min"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "24GX"], ["gpu", "24GX", "RTX 4090"]),
        (["--gpu", "Voodoo", "--plan", "kep", "--compute", "fp9"], ["'Voodoo'", "did you mean 'keep'", "'fp8'"]),
        (["--gpu", "24GB", "--quant", "nf5", "--optimizer", "adam", "--plan", "kep"],
         ["did you mean 'nf4'", "did you mean 'adamw'", "did you mean 'keep'"]),
        (["--gpu", "24GB", "--full"], ["--quant none"]),
        (["--gpu", "RTXX 4090"], ["did you mean 'RTX 4090'?"]),
        (["--gpu", "24GB", "--full", "--quant", "none", "--rank", "8", "--plan", "30GB"],
         ["--rank: expected to be left out with --full, got 8. Every weight is trained: there is no adapter.",
          "--plan: expected no more than the GPU has: 24GB has 24.00 GB, and 22.21 GB for a step, got '30GB'"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_together(folder, capsys, arguments, words):
    code, out = told(capsys, folder, *arguments)
    assert code == 3 and all(word in out.err for word in words)


OLDER = [("A100", "8.0"), ("nvidia a10g", "8.6"), ("V100", "7.0"), ("T4", "7.5")]


@pytest.mark.parametrize(("gpu", "capability"), OLDER)
def test_a_gpu_without_fp8_products_is_refused_with_its_capability(gpu, capability, folder, capsys):
    for compute in ("fp8", "fp8+head"):
        code, out = told(capsys, folder, "--gpu", gpu, "--compute", compute)
        name = gpu.split()[-1].upper()
        assert code == 3 and f"{name} has compute capability {capability}; fp8 products need 8.9 or more" in out.err
        assert f"--compute: expected exact here: {name}" in out.err and f"got {compute!r}" in out.err
        assert (
            "name a GPU that has them: B200, H200, H100 PCIe, H100 NVL, H100, L40S, L40, L4, RTX 5090, RTX 4090, "
            "RTX 4070, RTX 4060." in out.err
        )
    assert told(capsys, folder, "--gpu", gpu, "--plan", "offload")[0] != 3


def test_a_gpu_with_fp8_products_and_one_known_by_its_memory_alone_are_not_refused(folder, capsys):
    for gpu in ("RTX 4090", "L4", "H100", "B200", "80GB"):
        assert told(capsys, folder, "--gpu", gpu, "--compute", "fp8", "--length", 512)[0] == 0
    code, out = told(capsys, folder, "--gpu", "A100", "--compute", "fp8", "--quant", "nf5")
    assert code == 3 and "did you mean 'nf4'" in out.err and "A100 has compute capability 8.0" in out.err


def test_configs_that_cannot_be_read(tmp_path, capsys):
    code, out = told(capsys, tmp_path, "--gpu", "24GB")
    assert code == 1 and "no config.json" in out.err
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in told(capsys, tmp_path, "--gpu", "24GB")[1].err
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    code, out = told(capsys, tmp_path, "--gpu", "24GB")
    assert code == 1 and "num_hidden_layers" in out.err and "vocab_size" in out.err
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "no spec is known" in told(capsys, tmp_path, "--gpu", "24GB")[1].err


@pytest.fixture
def adapter(folder):
    """A run's folder beside its base model, which it names by the way there."""
    made = Path(folder) / "run"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"../../{Path(folder).name}"}))
    (made / "run.json").write_text("{}")
    return made


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "by its path"])
def test_an_adapter_is_planned_as_its_base(beside, adapter, folder, capsys):
    if not beside:
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": folder}))
    given = ("--gpu", "24GB", "--length", 8192)
    whole = json.loads(told(capsys, folder, *given, "--json")[1].out)
    code, out = told(capsys, adapter, *given, "--json")
    found = json.loads(out.out)
    note = f"{adapter} is an adapter: the step is that of its base model {folder} with a new one"
    assert code == 0 and found == {**whole, "model": str(adapter), "notes": [note]}
    assert f"note:           {note}\n" in told(capsys, adapter, *given)[1].out
    file = adapter / "adapter_config.json"
    code, out = told(capsys, file, *given, "--json")
    assert code == 0 and json.loads(out.out) == {
        **whole, "model": str(file), "notes": [note.replace(str(adapter), str(file), 1)],
    }  # fmt: skip


def test_no_new_adapter_is_told_of_where_every_weight_is_trained(adapter, folder, capsys):
    code, out = told(capsys, adapter, "--gpu", "80GB", "--quant", "none", "--full", "--json")
    note = f"{adapter} is an adapter: the step is that of its base model {folder}"
    assert code == 0 and json.loads(out.out)["notes"] == [note]


def test_an_adapter_whose_base_tells_nothing(adapter, folder, capsys):
    (Path(folder) / "config.json").unlink()
    code, out = told(capsys, adapter, "--gpu", "24GB")
    named = f"no config.json in this folder, which {adapter} names as the base model of its adapter"
    assert code == 1 and out.err == f"error: {folder}: {named}\n"
    for wrong, said in (("/gone/base", "its base model is not at /gone/base any more"), (3, "names no base model")):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": wrong}))
        code, out = told(capsys, adapter, "--gpu", "24GB")
        assert code == 1 and said in out.err
    (adapter / "adapter_config.json").unlink()
    code, out = told(capsys, adapter, "--gpu", "24GB")
    expected = "give the folder of a whole model, of an adapter, or of a run that has ended"
    assert code == 1
    assert out.err == f"error: {adapter}: no config.json and no adapter_config.json in this folder; {expected}\n"
    (adapter / "checkpoint-7").mkdir()
    said = f"; its newest checkpoint is {str(adapter / 'checkpoint-7')!r}\n"
    assert told(capsys, adapter, "--gpu", "24GB")[1].err.endswith(said)


def test_it_needs_no_torch(folder, adapter):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastft.cli.main import main\n"
        f"assert [main(['plan', name, '--gpu', '24GB']) for name in ({folder!r}, {str(adapter)!r})] == [0, 0]"
    )
    env = {"PYTHONPATH": str(Path(fastft.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_where_no_milder_ones_are_enough_those_that_leave_the_length_are_told(folder, capsys):
    found = json.loads(
        told(capsys, folder, "--gpu", "12GB", "--plan", "min", "--batch", 16, "--length", 8192, "--json")[1].out
    )
    assert [remedy["name"] for remedy in found["remedies"]] == [
        "batch size 1 with 16 times the accumulation",
        "length 512",
    ]
    assert found["remedies_together"]["names"] == ['plan="auto"', "batch size 2 with 8 times the accumulation"]
    assert told(capsys, folder, "--gpu", "12GB", "--batch", 2, "--length", 8192)[0] == 0


@pytest.mark.parametrize(("rank", "gpu", "enough"), [(48, "9GB", 24), (128, "10.5GB", 32)])
def test_the_rank_is_as_high_as_will_do(rank, gpu, enough, folder, capsys):
    given = (folder, "--gpu", gpu, "--rank")
    found = json.loads(told(capsys, *given, rank, "--json")[1].out)
    assert f"rank {enough}" in [remedy["name"] for remedy in found["remedies"]]
    assert [told(capsys, *given, tried)[0] for tried in (enough, 2 * enough)] == [0, 2]


@pytest.mark.parametrize(
    ("names", "same"),
    [(("adamw_torch", "adamw_torch_fused"), "adamw"), (("adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit")],
)
def test_names_that_transformers_has_for_an_optimizer(names, same, folder, capsys):
    given = (folder, "--gpu", "24GB", "--json", "--optimizer")
    plans = [json.loads(told(capsys, *given, name)[1].out) for name in (same, *names)]
    assert plans[1:] == plans[:1] * 2
    other = json.loads(told(capsys, *given, "adamw" if same == "adamw_8bit" else "adamw_8bit")[1].out)
    assert other["peak_bytes"] != plans[0]["peak_bytes"]


def test_an_optimizer_that_is_not_known_is_told_with_all_names(folder, capsys):
    code, out = told(capsys, folder, "--gpu", "24GB", "--optimizer", "adamw_trch")
    names = "adamw, adamw_8bit, adamw_torch, adamw_torch_fused, adamw_bnb_8bit, paged_adamw_8bit"
    assert (
        code == 3 and f"--optimizer: expected one of {names}, got 'adamw_trch'. did you mean 'adamw_torch'?" in out.err
    )
