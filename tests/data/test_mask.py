"""The tokens that bear loss are those the model would sample: against a rendering written out here, of any text."""

import os
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft.data.chat import chat_dataset
from fastft.data.mask import merged, prefix_offsets, token_range
from fastft.errors import DataError

CONTENT = st.text(st.sampled_from("ab .\n\tCold?<|>é日😀x1{}'\""), min_size=1, max_size=12).filter(str.strip)
TURN = st.tuples(st.sampled_from(["user", "assistant", "tool", "system"]), CONTENT)


def told(turns):
    """Somebody answers, and nobody answers twice in a row."""
    roles = [role for role, _ in turns]
    return "assistant" in roles and ("assistant", "assistant") not in pairwise(roles)


CHAT = st.lists(TURN, min_size=1, max_size=6).filter(told)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session", params=["bytes", "sentencepiece"])
def pair(request, build_tokenizer, unmarked):
    return build_tokenizer(request.param), build_tokenizer(request.param, unmarked)


def written(turns):
    """ChatML, and which of its characters are sampled."""
    text, sampled = "", []
    for role, content in turns:
        parts = [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", role == "assistant"), ("\n", False)]
        for part, bears in parts:
            text += part
            sampled += [bears] * len(part)
    return text, sampled


def expected(tokenizer, turns, only_last=False):
    text, sampled = written(turns)
    if only_last:
        end = len(sampled) - sampled[::-1].index(True)
        start = end - sampled[:end][::-1].index(False)
        sampled = [start <= place < end for place in range(len(sampled))]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return found["input_ids"], [token if any(sampled[low:high]) else -100 for token, (low, high) in pairs]


def row(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@QUICK
@given(chats=st.lists(CHAT, min_size=1, max_size=3))
def test_exactly_what_the_assistant_says_and_its_stop_token(pair, chats):
    marked, _ = pair
    for train_on in ("assistant", "last", "completion"):
        made = chat_dataset([row(turns) for turns in chats], marked, train_on)
        for found, turns in zip(made, chats, strict=True):
            ids, labels = expected(marked, turns, train_on != "assistant")
            assert found["input_ids"] == ids
            assert found["labels"] == labels
            stop = marked.eos_token_id
            answers = sum(role == "assistant" for role, _ in turns) if train_on == "assistant" else 1
            assert found["labels"].count(stop) == answers


@QUICK
@given(turns=CHAT)
def test_a_known_format_without_markers_has_the_same_masks(pair, turns):
    marked, unmarked = pair
    turns = [("user" if role == "tool" else role, content) for role, content in turns]
    assert chat_dataset([row(turns)], unmarked)[:] == chat_dataset([row(turns)], marked)[:]


@QUICK
@given(turns=CHAT)
def test_prompt_with_completion(pair, turns):
    marked, unmarked = pair
    messages = [*row(turns)["messages"], {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    halves = [{"prompt": messages[:-1], "completion": messages[-1:]}]
    whole = chat_dataset([{"messages": messages}], marked, "last")[:]
    for tokenizer in (marked, unmarked) if all(role != "tool" for role, _ in turns) else (marked,):
        assert chat_dataset(halves, tokenizer)[:] == whole
    several = [{"prompt": messages[:1], "completion": messages[1:]}]
    if turns[0][0] != "assistant" and (len(turns) == 1 or turns[1][0] == "assistant"):
        assert chat_dataset(several, marked)[:] == chat_dataset([{"messages": messages}], marked)[:]


def test_a_template_that_only_resembles_a_known_format(build_tokenizer, unmarked):
    """It renders some rows otherwise: those are errors that say so, and all others are used."""
    twisted = unmarked.replace(
        "+ message['role'] +", "+ message['role'] + ('!' if 'twist' in message['content'] else '') +"
    )
    tokenizer = build_tokenizer("bytes", twisted)
    plain, other = row([("user", "a"), ("assistant", "b")]), row([("user", "twist"), ("assistant", "b")])
    assert chat_dataset([plain], tokenizer)[:] == chat_dataset([plain], build_tokenizer())[:]
    with pytest.raises(
        DataError, match=r"^row 1, messages: expected the rendering of the known format.*get_chat_templ"
    ):
        chat_dataset([plain, other], tokenizer)
    assert len(chat_dataset([plain, other], tokenizer, "all")) == 2


@pytest.mark.parametrize("inside", ["\n", "\n\n", " "])
def test_blanks_behind_the_stop_token_are_not_sampled(build_tokenizer, marked, inside):
    wide = marked.replace(
        "+ '<|im_end|>' }}{%- endgeneration %}", f"+ '<|im_end|>{inside}' }}}}{{%- endgeneration %}}", 1
    )
    narrow = marked.replace("+ '<|im_end|>' }}{%- endgeneration %}", "}}{%- endgeneration %}{{- '<|im_end|>' }}", 1)
    assert wide != marked != narrow
    rows = [row([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])]
    stop = build_tokenizer().eos_token_id
    for template in (wide, narrow):
        tokenizer = build_tokenizer("bytes", template)
        learnt = [label for label in chat_dataset(rows, tokenizer)[0]["labels"] if label != -100]
        b, d = (tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "bd")
        assert learnt == [*b, stop, *d, stop]


def test_a_generation_prompt_inside_the_markers_is_not_sampled(build_tokenizer, marked):
    header = "{{- '<|im_start|>' + message['role'] + '\n' }}"
    moved = marked.replace(header, "{%- if message['role'] != 'assistant' %}" + header + "{%- endif %}", 1)
    moved = moved.replace("{%- generation %}", "{%- generation %}{{- '<|im_start|>assistant\n' }}")
    rows = [row([("user", "a"), ("assistant", "b\nc"), ("user", "c"), ("assistant", "d")])]
    assert chat_dataset(rows, build_tokenizer("bytes", moved))[:] == chat_dataset(rows, build_tokenizer())[:]


def test_a_stop_token_that_is_another_turns_header_is_none(build_tokenizer):
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}{%- generation %}{{- m['content'] }}"
        "{%- endgeneration %}{%- endfor %}"
    )
    tokenizer = build_tokenizer("bytes", template)
    with pytest.raises(DataError, match=r"row 0, assistant turn 2: expected a stop token at its end"):
        chat_dataset([row([("user", "a"), ("assistant", "b"), ("user", "c")])], tokenizer)


def test_tool_calls_bear_loss_and_their_results_do_not(build_tokenizer):
    from fastft.registry.chat import chat_format

    tokenizer = build_tokenizer("bytes", chat_format("qwen-2.5").jinja)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "secret result"},
        {"role": "assistant", "content": "It is 1."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}]
    made = chat_dataset([{"messages": messages, "tools": tools}], tokenizer)[0]
    learnt = tokenizer.decode([label for label in made["labels"] if label != -100])
    assert '"name": "add"' in learnt and "It is 1." in learnt and learnt.count("<|im_end|>") == 2
    assert "secret" not in learnt and "<|im_start|>" not in learnt and "description" not in learnt


def test_a_tokenizer_that_tells_no_offsets(build_tokenizer):
    """The number of tokens before a cut, from tokenising up to it."""
    tokenizer = build_tokenizer()
    text, sampled = written([("user", "hot?"), ("assistant", "Cold 😀."), ("user", "é"), ("assistant", "x")])

    def encode(part):
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    ids = encode(text)
    edges = [place for place in range(1, len(text)) if sampled[place] != sampled[place - 1]]
    offsets = prefix_offsets(text, ids, encode, edges)
    assert len(offsets) == len(ids)
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    found = [token_range(offsets, *span) for span in spans]
    exact = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert found == [token_range(exact, *span) for span in spans]


@pytest.mark.parametrize(
    "name, learnt",
    [
        ("gpt-oss", "<|channel|>final<|message|>b<|channel|>final<|message|>d<|return|>"),  # history has another end
        ("glm-4", "b<|user|>d<|user|>"),  # the stop token opens the next turn
        ("command-r7b", "".join(f"<|START_RESPONSE|>{a}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for a in "bd")),
        ("qwen-3-thinking", "\n</think>\n\nd<|im_end|>"),  # the prompt opens the thinking, and did before b
    ],
)
def test_formats_with_ends_of_their_own(name, learnt, build_tokenizer):
    from fastft.data.responses import train_on_responses_only
    from fastft.registry.chat import chat_format

    form = chat_format(name)
    tokenizer = build_tokenizer("bytes", form.jinja)
    around = form.user.start + form.user.end + form.assistant.start + learnt
    named = {*form.stop_tokens, *re.findall(r"<\|[^<> ]+?\|>", around)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(named | {"<|im_start|>"})})
    rows = [row([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])]
    made = chat_dataset(rows, tokenizer)
    found = tokenizer.decode([label for label in made[0]["labels"] if label != -100])
    assert found == learnt
    everything = chat_dataset(rows, tokenizer, "all")
    assert train_on_responses_only(everything, tokenizer=tokenizer)["labels"][:] == made["labels"][:]


def test_spans():
    assert merged([(5, 7), (0, 2), (2, 4), (4, 4), (6, 9)]) == [(0, 4), (5, 9)]
    offsets = [(0, 2), (2, 2), (2, 5), (5, 6), (5, 6), (6, 8)]
    assert token_range(offsets, 2, 5) == (1, 3) and token_range(offsets, 4, 6) == (2, 5)
    assert token_range(offsets, 1, 2) == (0, 1)


@pytest.mark.skipif(not os.environ.get("FASTFT_LLAMA_CPP_SOURCE"), reason="set FASTFT_LLAMA_CPP_SOURCE")
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "llama-spm", "phi-3", "deepseek-llm"])
@QUICK
@given(turns=CHAT)
def test_real_tokenizers(name, turns, marked):
    from vocabularies import real_tokenizer

    tokenizer = REAL.get(name) or REAL.setdefault(name, real_tokenizer(name))
    if tokenizer.chat_template is None:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = marked
    found = chat_dataset([row(turns)], tokenizer)[0]
    assert (found["input_ids"], found["labels"]) == expected(tokenizer, turns)


REAL = {}
