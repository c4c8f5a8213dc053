"""Every format's Go template against its Jinja, for the same conversations.

Ollama writes the first BOS itself, leaves a last message of the assistant's open, and prints JSON without spaces, which
the evaluator writes as Python does. It joins messages of one role that follow each other, so none do here.
"""

import json
import os
import shutil
import subprocess

import pytest
from gotemplate import GoError, ollama, ollama_data
from gotemplate import render as go

from fastft.data.template import render
from fastft.registry.chat import chat_format, chat_formats, with_tokens

FORMATS = chat_formats()
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
DATE = "2024-07-26"
SYSTEM = [{"role": "system", "content": "Be brief. Éà 漢字"}]
TURNS = [
    {"role": "user", "content": "What is 2 + 2?\nSay why."},
    {"role": "assistant", "content": "4, by counting."},
    {"role": "user", "content": "And {{ 3 }} <b>'3'</b>?"},
    {"role": "assistant", "content": "6\n\nas before."},
    {"role": "user", "content": "Thanks"},
]
PROMPTS = {"one": TURNS[:1], "two": TURNS[:3], "three": TURNS}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look at the sky.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
CALLED = [
    {"role": "user", "content": "Rain in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "no", "tool_call_id": "abcdefghi"},
]


def jinja(form, messages, prompt=True, **options):
    text = render(form, messages, add_generation_prompt=prompt, current_date=DATE, **options).text
    return text.removeprefix(form.bos)


@each_format
@pytest.mark.parametrize("system", [[], SYSTEM], ids=["bare", "system"])
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(form, case, system):
    messages = system + PROMPTS[case]
    assert ollama(form.ollama_template, messages) == jinja(form, messages)


@each_format
def test_an_answer_that_is_to_be_continued(form):
    """Up to where generation would go on: after the answer, before its stop token."""
    last = {**TURNS[3], **({"reasoning_content": "so it is"} if form.thinking else {})}
    messages = [*TURNS[:3], last]
    whole = jinja(form, messages, prompt=False)
    open_ = whole[: whole.rindex(TURNS[3]["content"]) + len(TURNS[3]["content"])]
    assert ollama(form.ollama_template, messages) == open_
    assert form.thinking is None or "so it is" in open_


@pytest.mark.parametrize("form", [form for form in FORMATS if form.thinking], ids=lambda form: form.name)
@pytest.mark.parametrize("think", [False, True])
def test_reasoning_switched(form, think):
    messages = SYSTEM + TURNS
    assert ollama(form.ollama_template, messages, think=think) == jinja(form, messages, enable_thinking=think)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.tools], ids=lambda form: form.name)
@pytest.mark.parametrize("system", [[], SYSTEM], ids=["bare", "system"])
def test_tools(form, system):
    if form.tools.indent:
        pytest.skip("Ollama cannot indent JSON, so the list of tools differs in white space; see the next test")
    for messages in (CALLED[:1], CALLED, [*CALLED, TURNS[1], TURNS[2]]):
        expected = jinja(form, system + messages, tools=[TOOL])
        if "{keywords}" in form.tools.call:
            expected = expected.replace("place='Rome'", 'place="Rome"')  # Ollama has no function for single quotes
        assert ollama(form.ollama_template, system + messages, tools=[TOOL]) == expected


@pytest.mark.parametrize("form", [form for form in FORMATS if form.tools], ids=lambda form: form.name)
def test_tools_but_for_white_space(form):
    ours, served = jinja(form, CALLED, tools=[TOOL]), ollama(form.ollama_template, CALLED, tools=[TOOL])
    assert "".join(served.split()).replace('"', "'") == "".join(ours.split()).replace('"', "'")


@each_format
def test_modelfile_stops(form):
    assert set(form.stop_tokens[:1]) <= set(form.ollama_stops)
    assert '"""' not in form.ollama_template


def test_another_eos():
    form = with_tokens(chat_format("zephyr"), eos="<|endoftext|>")
    messages = SYSTEM + TURNS
    assert ollama(form.ollama_template, messages) == jinja(form, messages)
    assert form.ollama_stops[0] == form.stop_token == "<|endoftext|>" and "</s>" not in form.ollama_template


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{- 1 -}} b", "a1b"),
        ("a {{ 1 }} b", "a 1 b"),
        ("{{ if .X }}x{{ else if .Y }}y{{ else }}z{{ end }}", "y"),
        ("{{ $n := 0 }}{{ range $i, $v := .L }}{{ $n = $i }}{{ $v }}{{ end }}{{ $n }}", "ab1"),
        ("{{ range $i, $v := .L }}{{ eq (len (slice $.L $i)) 1 }}{{ end }}", "falsetrue"),
        ('{{ and .Y (not .X) }}{{ or .X "q" }}{{ ne "a" "b" }}', "trueqtrue"),
        ("{{ .M.N }}}", "5}"),
        ("{{ json .S }}", '"s\\""'),
        ("{{ .S ", None),
        ("{{ .Nothing }}", None),
        ("{{ $q }}", None),
        ("{{ if .X }}", None),
        ("{{ end }}", None),
        ("{{ trim .S }}", None),
        ("{{ eq 1 .S }}", None),
    ],
)
def test_the_evaluator(template, text):
    data = {"X": False, "Y": True, "L": ["a", "b"], "M": {"N": 5}, "S": 's"'}
    if text is None:
        with pytest.raises(GoError):
            go(template, data)
    else:
        assert go(template, data) == text


PROGRAM = """
package main

import ("bytes"; "encoding/json"; "os"; "text/template")

func main() {
	var cases []struct { Template string; Data map[string]any }
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	texts := []string{}
	functions := template.FuncMap{
		"json": func(v any) string { b, _ := json.Marshal(v); return string(b) },
		"currentDate": func() string { return "2024-07-26" },
	}
	for _, c := range cases {
		var b bytes.Buffer
		t, err := template.New("").Option("missingkey=error").Funcs(functions).Parse(c.Template)
		if err == nil { err = t.Execute(&b, c.Data) }
		if err != nil { panic(err) }
		texts = append(texts, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs the Go toolchain; the evaluator stands in for it")
def test_go_itself_agrees(tmp_path):
    """Go's own text/template on every format, so that the evaluator above is judged too."""
    cases, expected = [], []
    for form in FORMATS:
        asked = [(system + turns, None) for system in ([], SYSTEM) for turns in (*PROMPTS.values(), TURNS[:4])]
        asked += [(SYSTEM + CALLED, [TOOL])] if form.tools else []
        for messages, tools in asked:
            for think in (None, False, True):
                data = ollama_data(messages, tools=tools, think=think)
                plain = json.loads(json.dumps(data, default=str))
                for message in plain["Messages"]:
                    for call in message["ToolCalls"]:
                        if "{keywords}" not in form.tools.call:  # what Ollama's arguments print themselves as
                            call["Function"]["Arguments"] = json.dumps(call["Function"]["Arguments"])
                cases.append({"Template": form.ollama_template, "Data": plain})
                expected.append(ollama(form.ollama_template, messages, tools=tools, think=think))
    (tmp_path / "main.go").write_text(PROGRAM)
    env = {**os.environ, "GOFLAGS": "-mod=mod", "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    ran = subprocess.run(
        ["go", "run", "main.go"], input=json.dumps(cases), env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected
