"""The kinds of rows that are known: their columns, the names people give these, and the roles of a conversation."""

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

Kind = Literal["messages", "sharegpt", "prompt_completion", "instruction", "preference", "text", "input_ids"]
PLAIN: tuple[Kind, ...] = ("messages", "prompt_completion", "text")  # canonical, whatever the names of other columns

CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message")
# parts that rows of turns or instructions may have beside them
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")

# kind -> alternatives of its fields, each part -> column; a part that ends with "?" may be missing.
EXACT: dict[Kind, tuple[dict[str, str], ...]] = {
    "prompt_completion": ({"prompt": "prompt", "completion": "completion"},),
    "preference": ({"prompt?": "prompt", "chosen": "chosen", "rejected": "rejected"},),
    "instruction": (
        {"instruction": "instruction", "input?": "input", "output": "output"},
        {"instruction": "instruction", "input?": "context", "output": "response"},
        {"instruction": "instruction", "input?": "input", "output": "response"},
        {"instruction": "instruction", "input?": "input", "output": "answer"},
    ),
    "text": ({"text": "text"},),
    "input_ids": ({"input_ids": "input_ids"},),
}
# Asked only where nothing of the above is there: these names are used for other things too.
LOOSE: dict[Kind, tuple[dict[str, str], ...]] = {
    "instruction": (
        {"instruction": "question", "output": "answer"},
        {"instruction": "question", "output": "response"},
        {"instruction": "query", "output": "response"},
        {"instruction": "query", "output": "answer"},
        {"instruction": "prompt", "output": "response"},
        {"instruction": "prompt", "output": "answer"},
        {"instruction": "problem", "output": "solution"},
        {"instruction": "input", "output": "output"},
    ),
    "text": ({"text": "content"},),
}
KNOWN = (
    "'messages' or 'conversations' (lists of turns), 'prompt' and 'completion', 'instruction' (with 'input') and "
    "'output', 'chosen' and 'rejected', 'text', or 'input_ids'"
)

ROLES = ("system", "developer", "user", "assistant", "tool")
# The role that is meant -> the names it has in data sets. Compared in lower case.
ROLE_NAMES: dict[str, tuple[str, ...]] = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter", "input"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "claude", "bard", "output"),
    "tool": ("tool", "tool_response", "function", "function_response", "observation", "ipython"),
}
CALL_ROLES = ("function_call", "tool_call")
ROLE_OF = {name: role for role, names in ROLE_NAMES.items() for name in names}


@frozen
class Recognised:
    """What rows are.

    * `kind`: "messages", "sharegpt" (turns under other names), "prompt_completion", "instruction", "preference",
      "text" or "input_ids".
    * `fields`: part -> column, e.g. `{"instruction": "question", "output": "answer"}`.
    * `statement`: one line for people.
    * `rows`: how many there are; None for a stream.
    * `keys`: the names of role and content in a turn, where there are turns; None where the parts are texts.
    """

    kind: Kind
    fields: Mapping[str, str] = field(converter=dict, hash=False)
    statement: str
    rows: int | None = None
    keys: tuple[str, str] | None = None
