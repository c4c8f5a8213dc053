"""Estimates and plans from sizes alone: budgets are kept, mixtures are the fastest that fit, strings are parsed."""

import json
from itertools import product
from pathlib import Path

import pytest

from fastft.errors import UsageError
from fastft.memory.devices import device_of, find_device, parse_bytes
from fastft.memory.estimate import Mode, estimate, saved_bytes, setup_of
from fastft.memory.levels import LEVELS
from fastft.memory.oom import message
from fastft.memory.plan import budget_of, describe_modes, longest, named_modes, plan_problem, remedies, solve, usable
from fastft.memory.shape import shape_of
from fastft.registry.resolve import resolve

LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
H200 = find_device("NVIDIA H200")
GB = 10**9


def setup(layers=32, **changes):
    return setup_of(shape_of({**LLAMA_8B, "num_hidden_layers": layers}, resolve("llama")), 4, 4096, **changes)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * GB), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000), ("800MB", 8 * 10**8), ("512", 512),
     ("24GX", None), ("GB", None), ("-1GB", None), ("1e9", None), ("", None)],
)  # fmt: skip
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


def test_plans_that_are_none_are_refused_with_what_is_allowed():
    assert [plan_problem(plan) for plan in ("auto", "keep", "min", "offload", "24GB", 10**9)] == [None] * 6
    assert "did you mean 'offload'" in str(plan_problem("offlaod"))
    for plan in (0, -1, True, 1.5, None, "24GX", "0GB"):
        assert "'24GB'" in str(plan_problem(plan)) or "positive" in str(plan_problem(plan)), plan
    assert [budget_of(plan) for plan in ("auto", "min", "2GB", 7)] == [None, None, 2 * GB, 7]


def test_devices_by_memory_and_by_name():
    assert device_of("24GB").memory == 24 * GB and device_of("24GB").flops == 0
    assert device_of("H100").name == "H100" and find_device("NVIDIA H100 PCIe").name == "H100 PCIe"
    assert find_device("NVIDIA GeForce RTX 4090").name == "RTX 4090" and find_device("Radeon") is None
    with pytest.raises(UsageError, match=r"gpu: expected an amount of memory such as 24GB .* got 'Voodoo'"):
        device_of("Voodoo")


def test_sizes_of_a_known_model():
    """Llama 3.1 8B: parameters and NF4 bytes counted by hand; a layer keeps 92.5 KB a token."""
    shape = shape_of(LLAMA_8B, resolve("llama"))
    assert shape.layer_weights == 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336
    assert 32 * shape.layer_weights + shape.embedding_weights == 8_029_995_008  # without norms
    assert shape.lora_parameters(16) == 41_943_040
    made = setup()
    assert made.weights == pytest.approx(5.70e9, rel=1e-3) and made.optimizer == 8 * 41_943_040
    kept = {level: saved_bytes(made, level) / made.tokens / 1024 for level in LEVELS}
    assert 92 < kept["keep"] < 93 and 36 < kept["attention"] < 37 and 8 < kept["min"] < 8.1
    assert list(kept.values()) == sorted(kept.values(), reverse=True)


def test_a_config_without_sizes_is_refused_with_all_that_is_missing():
    with pytest.raises(UsageError) as caught:
        shape_of({"model_type": "llama", "hidden_size": 64, "vocab_size": -1}, resolve("llama"))
    assert len(caught.value.problems) == 4 and "intermediate_size" in str(caught.value)


@pytest.mark.parametrize("budget", [70, 50, 30, 16, 12, 10.2])
def test_a_solved_plan_fits_and_uses_its_budget(budget):
    made = solve(setup(), int(budget * GB), H200)
    assert made.fits and made.estimate.peak <= budget * GB
    assert len({mode.level for mode in made.modes}) <= 3
    if budget < 58:  # below what keeping everything takes, less than one layer more is left
        assert made.estimate.peak > budget * GB - 1.02 * saved_bytes(setup(), "keep")


def test_less_memory_is_never_faster():
    times = [solve(setup(), int(budget * GB), H200).estimate.seconds for budget in (10.2, 11, 12, 16, 24, 40, 80)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_the_solver_finds_the_fastest_of_all_plans():
    """Against every choice of modes for three layers, in any order: none that fits is faster by more than a layer's
    rounding, since two neighbouring modes may leave room for less than one layer."""
    small = setup(layers=3)
    modes = [Mode(level, offload) for level in LEVELS for offload in (False, True)]
    every = [(made.peak, made.seconds, made.peak) for chosen in product(modes, repeat=3)
             if (made := estimate(small, chosen, H200))]  # fmt: skip
    slowest = max(seconds for _, seconds, _ in every)
    for budget in (8.6, 9.5, 11, 13, 20):
        found = solve(small, int(budget * GB), H200)
        fitting = [seconds for peak, seconds, _ in every if peak <= budget * GB]
        assert found.fits == bool(fitting)
        if fitting:
            assert found.estimate.seconds <= min(fitting) + (slowest - min(s for _, s, _ in every)) / 3


def test_what_cannot_fit_gives_the_smallest_plan_and_says_so():
    made = solve(setup(), 6 * GB, H200)
    assert not made.fits and made.estimate.peak > 6 * GB
    others = [estimate(setup(), named_modes(plan, 32)).peak for plan in ("keep", "min", "offload")]
    assert made.estimate.peak <= min(others)


def test_host_memory_is_a_limit_too():
    free = solve(setup(), 12 * GB, H200)
    bound = solve(setup(), 12 * GB, H200, host=0)
    assert free.estimate.host > 0 and bound.estimate.host == 0


def test_longest_length_is_the_last_that_fits():
    one = setup_of(shape_of(LLAMA_8B, resolve("llama")), 1, 4096)
    budget = usable(16 * GB)
    found = longest(one, budget, H200)
    fits = [solve(setup_of(one.shape, 1, length), budget, H200).fits for length in (found, found + 256)]
    assert found % 256 == 0 and fits == [True, False]


def test_remedies_save_what_they_say_and_are_ordered_by_cost():
    now = setup(quant=None)
    modes = named_modes("keep", 32)
    found = remedies(now, modes, 70 * GB)
    names = [remedy.name for remedy in found]
    assert names[:3] == ['plan="min"', 'plan="offload"', "batch size 2 with twice the accumulation"]
    assert names[3:] == ["an 8-bit optimizer (adamw_8bit)", 'quant="nf4"', "rank 8", "length 2048"]
    peak = estimate(now, modes).peak
    least = estimate(now, named_modes("min", 32)).peak
    assert found[0].saves == peak - least and found[0].fits == (least <= 70 * GB)
    assert all(remedy.saves > 0 for remedy in found)


def test_message_of_an_out_of_memory_holds_table_remedies_and_what_is_kept():
    text = message("CUDA out of memory. Tried", setup(), named_modes("keep", 32), 80 * GB, 79 * GB, "Step 3 is saved.")
    for part in ("out of memory: CUDA", "4 x 4096", "weights", "5.70", "peak", 'plan="min": saves', "Step 3 is saved."):
        assert part in text
    assert "smaller batch" in message("", None, (), None, 0)


MEASURED = Path(__file__).parents[2] / "docs/benchmarks/2026-11-22-memory-plan.json"
SHAPES = {
    "llama-8b": LLAMA_8B,
    "llama-1b": {
        **LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("row", json.loads(MEASURED.read_text())["plans"], ids=lambda row: row["shape"])
def test_predictions_stay_within_3_percent_of_what_was_measured_and_are_those_of_the_page(row):
    shape = shape_of({**SHAPES[row["shape"]], "num_hidden_layers": row["layers"]}, resolve("llama"))
    quant = "nf4" if row["weights"] == "NF4" else None
    modes = [Mode(level, moved) for count, level, moved in row["modes"] for _ in range(count)]
    made = estimate(setup_of(shape, row["rows"], row["length"], quant=quant), modes, H200)
    assert made.peak / 1e9 == pytest.approx(row["measured_gb"], rel=0.03)
    if row["shape"] == "llama-8b":  # the small one waits for its host
        assert made.seconds * 1e3 == pytest.approx(row["step_ms"], rel=0.05)
    told = f"| {describe_modes(modes)} | {row['measured_gb']:.2f} | {made.peak / 1e9:.2f} |"
    assert told in MEASURED.with_suffix(".md").read_text()


def test_modes_in_words():
    modes = (Mode("min", True), Mode("min", True), Mode())
    assert describe_modes(modes) == "2 layers min, moved to the CPU; 1 layer keep"
