"""Masks and packing with Mistral's real tokenizers: mistral-common says which tokens an answer consists of."""

from functools import cache

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("mistral_common", reason="Mistral's tokenizers come with mistral-common")

from mistral import FOLDER, tokenizer_of
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset
from fastft.data.packing import pack
from fastft.data.preview import preview
from fastft.data.responses import train_on_responses_only

FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v3-tekken": "tekken_240718.json",
}
# mistral-common cuts blanks at the ends of answers
CONTENT = st.text(st.sampled_from("ab .\n\tCold?<|>é日😀x1{}'\""), min_size=1, max_size=12).map(str.strip).filter(len)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def tokenizers(name):
    """Return ours, and mistral-common's for prompts and for whole conversations."""
    modes = (ValidationMode.test, ValidationMode.finetuning)
    judges = [MistralTokenizer.from_file(str(FOLDER / FILES[name]), mode=mode) for mode in modes]
    return get_chat_template(tokenizer_of(FILES[name]), name), *judges


def judged(name, turns):
    """Return the ids of a conversation and its labels: what stands behind each prompt, up to the next one."""
    _, prompts, wholes = tokenizers(name)
    messages, labels = [], []
    for asked, answered in turns:
        messages.append(UserMessage(content=asked))
        start = prompts.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        messages.append(AssistantMessage(content=answered))
        ids = wholes.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert ids[: len(start)] == start
        labels += [-100] * (len(start) - len(labels)) + ids[len(start) :]
    return ids, labels


def row(turns):
    pairs = [({"role": "user", "content": asked}, {"role": "assistant", "content": answer}) for asked, answer in turns]
    return {"messages": [message for pair in pairs for message in pair]}


@pytest.mark.parametrize("name", FILES)
@QUICK
@given(turns=TURNS)
def test_the_mask_is_exactly_what_the_assistant_samples(name, turns):
    tokenizer = tokenizers(name)[0]
    (made,) = chat_dataset([row(turns)], tokenizer)
    assert (made["input_ids"], made["labels"]) == judged(name, turns)
    (again,) = train_on_responses_only(chat_dataset([row(turns)], tokenizer, "all"), tokenizer=tokenizer)
    assert again["labels"] == made["labels"]


@pytest.mark.parametrize("name", FILES)
@QUICK
@given(chats=st.lists(TURNS, min_size=1, max_size=8))
def test_packed_rows_are_the_rows(name, chats):
    data = chat_dataset([row(turns) for turns in chats], tokenizers(name)[0])
    packed, told = pack(Dataset(data.data), 256)
    found = []
    for whole in packed:
        start = 0
        for size in whole["seq_lengths"]:
            found.append((whole["input_ids"][start : start + size], whole["labels"][start : start + size]))
            start += size
        assert start == len(whole["input_ids"]) <= 256
    assert sorted(found) == sorted(judged(name, turns) for turns in chats) and told["rows"] == len(chats)


@pytest.mark.parametrize("name", FILES)
def test_the_preview_shows_it(name):
    turns = [("Größe 日本?", "😀 {x}"), ("b", "Cold.")]
    (shown,) = preview([row(turns)], tokenizers(name)[0]).rows
    ids, labels = judged(name, turns)
    assert [token.id for token in shown.tokens] == ids
    assert [token.learnt for token in shown.tokens] == [label != -100 for label in labels]
