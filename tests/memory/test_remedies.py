"""What makes a step smaller: each change saves what it says, in the order of what it costs."""

import pytest
from attrs import evolve

from fastft.memory.estimate import estimate, setup_of
from fastft.memory.plan import named_modes
from fastft.memory.remedies import remedies
from fastft.memory.shape import Shape

LLAMA_8B = Shape(32, 4096, 14336, 32, 4096, 1024, 128256, False, (None,) * 32)
GB = 10**9


def setup(**changes):
    return setup_of(LLAMA_8B, 4, 4096, **changes)


def test_remedies_save_what_they_say_and_are_ordered_by_cost():
    now = setup(quant=None)
    modes = named_modes("keep", 32)
    found = remedies(now, modes, 70 * GB)
    names = [remedy.name for remedy in found]
    assert names[:3] == ['plan="min"', 'plan="offload"', "batch size 2 with twice the accumulation"]
    assert names[3] == "gate and up in 8 bits (not exact; a plan with '+8bit' behind it)"
    assert names[4:] == ["an 8-bit optimizer (adamw_8bit)", 'quant="nf4"', "rank 8", "length 2048"]
    peak = estimate(now, modes).peak
    least = estimate(now, named_modes("min", 32)).peak
    assert found[0].saves == peak - least and found[0].fits == (least <= 70 * GB)
    assert all(remedy.saves > 0 for remedy in found)


@pytest.mark.parametrize("full", [False, True])
def test_an_optimizer_in_8_bits_is_no_remedy_where_it_is_so_already(full):
    keep, narrow = named_modes("keep", 32), "an 8-bit optimizer (adamw_8bit)"
    made = {name: setup(quant=None, full=full, optimizer=name) for name in ("adamw", "adamw_8bit")}
    saves = {name: {r.name: r.saves for r in remedies(step, keep)} for name, step in made.items()}
    assert saves["adamw"][narrow] > 0 and narrow not in saves["adamw_8bit"]
    nf4 = 'LoRA with quant="nf4"' if full else 'quant="nf4"'
    then = estimate(setup(optimizer="adamw_8bit"), keep).peak
    assert saves["adamw_8bit"][nf4] == estimate(made["adamw_8bit"], keep).peak - then


def test_half_the_batch_has_half_the_answers():
    asked = evolve(setup(), head="logprobs", answers=4096)
    saved = next(r.saves for r in remedies(asked, named_modes("min", 32)) if r.name.startswith("batch size 2"))
    half = evolve(asked, rows=2, answers=2048)
    assert saved == estimate(asked, named_modes("min", 32)).peak - estimate(half, named_modes("min", 32)).peak
