"""The frozen records that describe a chat format: its markers, its rules, and which of its text a model samples.

The markers are the one source: the Jinja template that trains and the Go template that Ollama serves are both made
from them (`chat_jinja`, `chat_ollama`), unless the format brings templates of its own. In any marker `{bos}` and
`{eos}` stand for the tokenizer's tokens, and `{date}` for the date that the format puts into its system turn.
"""

from typing import Literal

from attrs import frozen

Role = Literal["system", "user", "assistant", "tool"]
SystemRule = Literal["turn", "first_user", "last_user", "refused"]
ToolList = Literal["system", "first_user", "last_user"]


@frozen
class Turn:
    """The markers before and after the content of a turn."""

    start: str = ""
    end: str = ""


@frozen
class AnswerTurn:
    """The markers of an assistant's turn: `start + lead + content + end + after`.

    `start` is the generation prompt. The model samples `lead`, the content and `end`, which is its stop token; `after`
    stands between the turns and is sampled by nobody. `after_last` says whether a last turn has it too.
    `end_is_next` marks formats without a token of their own for the end: `end` is then the token that opens the
    following user's turn, which has it once.
    `earlier_end` is what a turn that is not the last ends with, where that differs from the stop token.
    """

    start: str
    end: str
    lead: str = ""
    after: str = ""
    after_last: bool = True
    end_is_next: bool = False
    earlier_end: str | None = None


@frozen
class Thinking:
    """How reasoning (`reasoning_content`, or a part of the content between the markers) stands before an answer.

    Reasoning is rendered in answers to the last user's turn and, with `drop_earlier`, left out of those before it.
    `always`: the last answer has the markers even where there is no reasoning. `prompted`: the generation prompt opens
    the reasoning already, so `start` is not sampled. `off` is what the generation prompt gets for
    `enable_thinking=false`; `on` is what a format puts at the start of its system turn for `enable_thinking=true`.
    """

    start: str
    end: str
    drop_earlier: bool = True
    always: bool = False
    prompted: bool = False
    off: str = ""
    on: str = ""


@frozen
class Tools:
    """How tools are listed, called and answered.

    The list, `intro + tools joined by separator + outro`, stands in the turn that `where` names: at the end of the
    system turn, after `joint` where that has other text, or before the content of the first or last user's turn.
    With `own_turn` it stands before that turn's `start`. `preface` opens the system turn where there are tools.
    `each` is a tool's JSON (`{tool}`), indented by `indent` spaces.
    A call is `call` with `{name}`, `{arguments}` (JSON), `{keywords}` (`name=value, ...`) and `{id}`; several are
    joined by `call_joint` between `calls_start` and `calls_end`, which stand after content and `content_joint`.
    `single` refuses more than one call a turn, `alone` content beside a call. A result is `result` with `{content}`,
    `{content_json}` and `{id}`, between the markers of `turn`; `grouped` puts results that follow one another into one
    turn. `id_length`: calls and results need an id of so many letters and digits.
    """

    call: str
    result: str
    turn: Turn
    where: ToolList = "system"
    own_turn: bool = False
    preface: str = ""
    joint: str = ""
    intro: str = ""
    each: str = "{tool}"
    separator: str = ""
    outro: str = ""
    indent: int = 0
    calls_start: str = ""
    calls_end: str = ""
    call_joint: str = ""
    content_joint: str = ""
    single: bool = False
    alone: bool = False
    grouped: bool = False
    id_length: int = 0


@frozen
class ChatFormat:
    """All that fastft knows of one way to write conversations.

    `bos` and `eos` are the tokens of the models that the format comes from; a tokenizer's own take their place.
    `prefix` follows BOS, once. `system_rule` says where a system message goes: a `turn` of its own, into the
    `first_user` or `last_user` turn between the markers of `system`, or nowhere (`refused`). `default_system` is the
    system message of a conversation that brings none, and `system_preface` what every system turn starts with, so
    that there is always one; `system_after` follows the text. `date` is the default of the template's argument
    `date_string`, which `{date}` shows.
    `alternate`: user and assistant take turns, or rendering is an error. `trim`: white space round contents is cut.
    `image` is the marker of an image part, empty where there is none and image parts are an error.
    `instruction_part` and `response_part` are the texts before a user's content and before the assistant's answer.
    `stop_tokens` end generation, the first of them ends an assistant's turn; `ollama_stops` are the stop parameters of
    a Modelfile. `sampled` lists the scaffold that the model would have to sample, the stop token included.
    `jinja` has `{% generation %}` exactly round what the model would have to sample. `ollama_template` leaves BOS to
    Ollama. `notes` says what differs from the format's origin, and why.
    """

    name: str
    title: str
    user: Turn
    assistant: AnswerTurn
    system: Turn = Turn()
    aliases: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    prefix: str = ""
    system_rule: SystemRule = "turn"
    default_system: str | None = None
    system_preface: str = ""
    system_after: str = ""
    date: str = ""
    alternate: bool = False
    trim: bool = False
    image: str = ""
    thinking: Thinking | None = None
    tools: Tools | None = None
    instruction_part: str = ""
    response_part: str = ""
    stop_tokens: tuple[str, ...] = ()
    ollama_stops: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()
    notes: str = ""
    jinja: str = ""
    ollama_template: str = ""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that a conversation may have."""
        system: tuple[Role, ...] = () if self.system_rule == "refused" else ("system",)
        return (*system, "user", "assistant", *(("tool",) if self.tools else ()))

    @property
    def refused_roles(self) -> tuple[Role, ...]:
        """The usual roles that make rendering an error."""
        usual: tuple[Role, ...] = ("system", "user", "assistant", "tool")
        return tuple(role for role in usual if role not in self.roles)

    @property
    def has_opening(self) -> bool:
        """Whether a conversation's system turn may be more than its system message, or there without one."""
        listed = self.tools is not None and self.tools.where == "system"
        switched = self.thinking is not None and bool(self.thinking.on)
        more = self.default_system is not None or bool(self.system_preface) or listed or switched
        return more and self.system_rule == "turn"

    @property
    def stop_token(self) -> str:
        """The token that ends an assistant's turn."""
        return self.stop_tokens[0]
