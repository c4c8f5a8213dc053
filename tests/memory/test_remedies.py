"""What makes a step smaller: each change saves what it says, in the order of what it costs."""

import pytest
from attrs import evolve

from fastft.memory.enough import Asked, enough_together
from fastft.memory.estimate import Mode, estimate, setup_of
from fastft.memory.oom import message
from fastft.memory.plan import named_modes
from fastft.memory.remedies import batch_name, changes, fewer_rows, lower_ranks, of_rank, remedies
from fastft.memory.shape import Shape

LLAMA_8B = Shape(32, 4096, 14336, 32, 4096, 1024, 128256, False, (None,) * 32)
GB = 10**9


KEEP, MIN = named_modes("keep", 32), named_modes("min", 32)
NARROW, EIGHT = "an 8-bit optimizer (adamw_8bit)", "gate and up in 8 bits (not exact; a plan with '+8bit' behind it)"


def setup(rows=4, length=4096, **changes):
    return setup_of(LLAMA_8B, rows, length, **changes)


def names_of(now, modes):
    return [remedy.name for remedy in remedies(now, modes)]


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
    assert fewer_rows(evolve(asked, answers=4097), 2).answers == 2049  # one more than half: none is lost
    assert fewer_rows(setup(), 1).answers is None
    assert [batch_name(setup(rows=rows), to) for rows, to in ((4, 2), (5, 2), (3, 1), (4, 1))] == [
        "batch size 2 with twice the accumulation",
        "batch size 2 with 2.5 times the accumulation",
        "batch size 1 with 3 times the accumulation",
        "batch size 1 with 4 times the accumulation",
    ]


def test_what_fits_a_budget_to_the_byte():
    peak = estimate(setup(), MIN).peak
    for budget, fits in ((peak, True), (peak - 1, False), (None, False)):
        (found,) = (remedy for remedy in remedies(setup(), KEEP, budget) if remedy.name == 'plan="min"')
        assert found.fits is fits


@pytest.mark.parametrize(("rows", "length", "smaller"), [
    (4, 4096, ["batch size 2 with twice the accumulation", "length 2048"]),
    (2, 257, ["batch size 1 with twice the accumulation", "length 128"]),
    (1, 256, []),
])  # fmt: skip
def test_what_can_be_halved(rows, length, smaller):
    found = names_of(setup(rows=rows, length=length), KEEP)
    assert [name for name in found if name.startswith(("batch", "length"))] == smaller


def test_what_saves_nothing_is_no_remedy():
    """Neither the plan that it has, nor 8 bits for what no layer keeps; the other changes are there still."""
    assert names_of(setup(quant=None), MIN) == [
        'plan="offload"', "batch size 2 with twice the accumulation", NARROW, 'quant="nf4"', "rank 8", "length 2048"
    ]  # fmt: skip
    for eight_bits, full in ((None, False), (True, False), (False, True)):
        now = evolve(setup(quant=None, full=full), eight_bits=eight_bits)
        found = names_of(now, KEEP)
        assert EIGHT not in found and NARROW in found
    copies = (Mode(dequantised=True),) * 32
    assert names_of(setup(), copies)[0] == 'plan="keep"' and 'plan="keep"' not in names_of(setup(), KEEP)
    assert names_of(evolve(setup(), eight_bits=True), copies)[0] == 'plan="keep+8bit"'


@pytest.mark.parametrize("options", [{}, {"full": True, "quant": None}, {"full": True, "quant": None, "element": 4}])
def test_an_optimizer_in_8_bits_takes_what_a_step_with_one_takes(options):
    change = dict(changes(setup(**options)))[NARROW]
    assert change(setup(**options)).optimizer == setup(**options, optimizer="adamw_8bit").optimizer


def test_nf4_leaves_the_rest_of_the_step_as_it_is():
    kept = {"head": "logprobs", "answers": 100, "norm": "eager", "eight_bits": True}
    for options in ({"rank": 8, "compute": "fp8"}, {"element": 4}):
        change = dict(changes(setup(quant=None, **options)))['quant="nf4"']
        assert change(evolve(setup(quant=None, **options), **kept)) == evolve(setup(**options), **kept)
    assert 'quant="nf4"' not in dict(changes(setup()))


def test_ranks_are_halved_down_to_4():
    found = {rank: lower_ranks(setup(rank=rank)) for rank in (64, 16, 12, 9, 8, 7, 4, 1)}
    assert found == {64: [32, 16, 8, 4], 16: [8, 4], 12: [6], 9: [4], 8: [4], 7: [], 4: [], 1: []}
    assert of_rank(setup(rank=16), 4) == setup(rank=4)
    for rank in (16, 32):
        now = setup(rank=16)
        assert of_rank(now, rank) is now


def test_where_lora_is_a_change_itself_its_rank_is_lowered_behind_it():
    """LoRA in place of training all weights has rank 16."""
    whole = setup(rows=1, length=512, full=True, quant=None)
    lora = dict(changes(whole))['LoRA with quant="nf4"'](whole)
    assert lora == setup(rows=1, length=512) and lora.rank == 16 and lower_ranks(whole) == [8, 4]
    found = [enough_together(Asked(whole, "auto", memory)) for memory in (8 * GB, 75 * GB // 10)]
    assert [one.names for one in found] == [('LoRA with quant="nf4"',), ('LoRA with quant="nf4"', "rank 4")]
    assert "rank 8" not in names_of(whole, KEEP)  # alone it is nothing


def test_the_text_of_an_out_of_memory_to_the_letter():
    now = evolve(setup(compute="fp8"), eight_bits=True)
    modes = (Mode("min"),) * 20 + (Mode("keep", dequantised=True),) * 12
    assert message("\nCUDA out of memory. Tried\nto allocate", now, modes, 20 * GB, 79 * GB, "Step 3 is saved.") == TEXT
    told = message("", now, modes, None, 0)
    assert told.startswith("out of memory\nWhat a step of 4 x 4096") and "enough" not in told
    assert "adapter" not in message("", setup(full=True, quant=None), KEEP, None, 0)  # of which there are no bytes
    assert message("", evolve(now, rows=0), modes, None, 0) == message("", None, (), None, 0)


TEXT = """\
out of memory: CUDA out of memory. Tried
The device has 20.00 GB for this process; tensors held 79.00 GB.
What a step of 4 x 4096 tokens is predicted to take, in GB:
  weights                   5.70
  weights in fp8            5.23
  adapter                   0.17
  optimizer state           0.34
  gradients                 0.01
  kept for the backward    16.01
  temporaries               1.58
  workspace                 0.07
  allocator                 0.15
  peak                     29.25
  (20 layers min; 12 layers keep, weights in fp8 (gate and up in 8 bits, not exact))
What would make it smaller, the cheapest first:
  plan="min": saves 15.20 GB, which is enough
  plan="offload": saves 19.31 GB, which is enough
  batch size 2 with twice the accumulation: saves 8.84 GB
  an 8-bit optimizer (adamw_8bit): saves 0.25 GB
  rank 8: saves 0.28 GB
  length 2048: saves 8.84 GB
Step 3 is saved."""
