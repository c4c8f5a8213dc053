"""The demo model's data: repeatable, right, and without the sums kept for evaluation."""

import re
from itertools import islice

import pytest

from fastft.demo import corpus, lesson, tasks

SUM = re.compile(r"(\d+) (?:\+|plus|and) (\d+)")
DIFFERENCE = re.compile(r"(\d+) (?:-|minus) (\d+)")
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def many():
    return list(tasks.conversations(8000, seed=0))


def test_the_seed_decides(many):
    assert list(tasks.conversations(300, seed=0)) == many[:300]
    assert list(tasks.conversations(300, seed=1)) != many[:300]
    assert lesson.rows(50, seed=4) == lesson.rows(50, seed=4) != lesson.rows(50, seed=5)


def test_held_out_sums_occur_nowhere(many):
    pairs = tasks.held_out_pairs(300)
    assert len(set(pairs)) == 300 and all(tasks.is_held_out(a, b) and tasks.is_held_out(b, a) for a, b in pairs)
    share = sum(tasks.is_held_out(a, b) for a in range(10, 100) for b in range(10, 100)) / 8100
    assert 0.07 < share < 0.13
    answers = [m["content"] for c in many for m in c if m["role"] == "assistant"]
    answers += [m["content"] for row in lesson.rows(3000, seed=0) for m in row["messages"] if m["role"] == "assistant"]
    sums = [(int(a), int(b)) for text in answers for a, b in SUM.findall(text)]
    sums += [(int(b), int(a) - int(b)) for text in answers for a, b in DIFFERENCE.findall(text)]
    assert len(sums) > 4000
    assert not [pair for pair in sums if tasks.is_held_out(*pair)]


def test_equations_in_answers_are_right(many):
    found = 0
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for chat in many:
        for message in chat:
            for a, sign, b, result in EQUATION.findall(message["content"] if message["role"] == "assistant" else ""):
                assert compute[sign](int(a), int(b)) == int(result), message
                found += 1
    assert found > 2000


def test_the_lesson_is_new_to_the_base_model(many):
    text = " ".join(message["content"] for chat in many for message in chat)
    assert "Ahoy" not in text and "together" not in text and "gives" not in text


def test_every_conversation_is_turns_in_order(many):
    for chat in many:
        roles = [message["role"] for message in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"] == message["content"].strip() != "" for message in chat)


def test_lesson_rows_are_chats_with_right_sums():
    for row in lesson.rows(200, seed=1):
        ask, answer = (message["content"] for message in row["messages"])
        assert answer.startswith("Ahoy! ") and answer.endswith("matey!")
        found = EQUATION.findall(answer)
        if found:
            a, _, b, result = map(str, found[0])
            assert int(a) + int(b) == int(result) and a in ask and b in ask


def test_documents_of_a_few_sources():
    topics = list(islice(corpus._topics(), 3))
    assert all(len(topic.text) > 100 for topic in topics)
    names = {document.name for document in corpus._compiled_modules()}
    assert {"str.upper", "dict", "itertools.chain"} <= names
    assert corpus.is_english("Return the number of items in a container.")
    assert not corpus.is_english("x = {1: 2, 3: 4}; y[0] += 7") and not corpus.is_english("Yes.")


def test_split_keeps_held_out_sources_and_paragraphs_apart():
    held = next(name for name in (f"module{i}.py" for i in range(999)) if corpus.is_held_out(name))
    kept = next(name for name in (f"module{i}.py" for i in range(999)) if not corpus.is_held_out(name))
    shared, own = "A paragraph that both of the sources hold. " * 3, "Only the held-out source says this sentence. " * 3
    train, texts = corpus.split([corpus.Document(kept, "a", shared), corpus.Document(held, "b", f"{shared}\n\n{own}")])
    assert [document.name for document in train] == ["a"]
    assert texts == [own]


def test_documented_functions_become_questions():
    documents = [
        corpus.Document("shutil.py", "shutil.copytree", "Recursively copy a directory tree and return it.\n\nMore."),
        corpus.Document("test/x.py", "test.x", "Check that everything is as it should be here."),
    ]
    chats = list(tasks.conversations(300, 0, documents))
    asked = [m["content"] for chat in chats for m in chat if "copytree" in m["content"]]
    assert asked and not any("test.x" in m["content"] for chat in chats for m in chat)
    assert any("Recursively copy" in m["content"] for chat in chats for m in chat)
