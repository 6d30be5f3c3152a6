"""Chats as text, with the assistant's turns marked, by the tokenizer's own chat template."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from gearshift.data.readers import Spans

ROLES = ("system", "developer", "user", "assistant", "tool")
SHARE_GPT = {"human": "user", "gpt": "assistant"}
"""The roles that ShareGPT calls otherwise."""
CALLS = ("tool_calls", "function_call")
"""What an assistant may say in place of a content."""
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Where a template itself says what the assistant generates."""
ADVICE = "give a template file as chat_template in the recipe"

Message = dict[str, Any]


class ChatTemplate:
    """Renders chats as a tokenizer's chat template does, and finds what the assistant wrote.

    A template with `{% generation %}` marks says so itself. Any other is rendered up to before and up to after each
    turn of the assistant: the turn is what was added, up to its last character that is not white space, and with it
    the token that ends the turn, where the template has one.
    """

    def __init__(self, tokenizer: Any):
        """ValueError if the tokenizer has no chat template, or does not say which characters its tokens stand for."""
        if not tokenizer.chat_template:
            raise ValueError(f"the model's tokenizer has no chat template: {ADVICE}")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot mark turns: chats need a tokenizer with a tokenizer.json"
            )
        self.template: str = tokenizer.get_chat_template()
        self.special: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def identity(self) -> Any:
        return [self.template, self.special]

    def __call__(self, value: Any, field: str, where: str) -> tuple[str, Spans]:
        """See `ChatRenderer`. Empty if the assistant says nothing in the chat."""
        messages = _messages(value, field, where)
        if not any(message["role"] == "assistant" and _says_anything(message) for message in messages):
            return "", []
        try:
            text, spans = self._marked(messages) if MARKER.search(self.template) else self._compared(messages)
        except (TemplateError, TypeError, _UnsteadyTemplateError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{where}: the chat template cannot render {field!r}: {said[0]}; mend the chat, or {ADVICE}"
            ) from None
        spans = [(first, end) for first, end in spans if first < end]
        return (text, spans) if spans else ("", [])

    def _marked(self, messages: list[Message]) -> tuple[str, Spans]:
        """By the template's own marks."""
        rendered, spans = self._render(messages, return_assistant_tokens_mask=True)
        return rendered[0], spans[0]

    def _compared(self, messages: list[Message]) -> tuple[str, Spans]:
        """By what each turn adds."""
        whole = self._text(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._text(messages[:number], add_generation_prompt=True)
                after = self._text(messages[: number + 1])
                end = max(len(before), len(after.rstrip()))
                if not (after.startswith(before) and whole.startswith(after[:end])):
                    raise _UnsteadyTemplateError(
                        f"it writes what leads up to message {number} otherwise once more has been said, so the"
                        " assistant's turn cannot be found without {% generation %} marks"
                    )
                spans.append((len(before), end))
        return whole, spans

    def _text(self, messages: list[Message], **more: Any) -> str:
        return self._render(messages, **more)[0][0]

    def _render(self, messages: list[Message], **more: Any) -> tuple[list[str], list[Any]]:
        return render_jinja_template([messages], chat_template=self.template, **self.special, **more)


class _UnsteadyTemplateError(Exception):
    """A template that cannot be compared with itself."""


def _messages(value: Any, field: str, where: str) -> list[Message]:
    """A row's chat as messages with a role and a content each. ValueError if it is none."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where}: {field!r} is not a list of messages but {_kind(value)}")
    return [_message(message, f"{where}: message {number} of {field!r}") for number, message in enumerate(value)]


def _says_anything(message: Message) -> bool:
    """Whether a message has more than names and blanks. What its turn ends with would be rendered all the same."""
    values = (value for key, value in message.items() if key not in ("role", "name"))
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is not an object but {_kind(given)}")
    # Tables have every key in every row: what a message does not have is null there.
    message = {key: value for key, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
    role, content = message.get("role"), message.get("content")
    role = SHARE_GPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}: known are {', '.join((*ROLES, *SHARE_GPT))}")
    if content is None and role == "assistant" and any(message.get(key) for key in CALLS):
        return {**message, "role": role}  # without a content, as transformers renders it
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise ValueError(f"{where} has a content that is not a text but {_kind(content)}")
    return {**message, "role": role, "content": content}


def _joined(parts: Sequence[Any], where: str) -> str:
    """The text of a content in parts, with nothing between them, as templates that know parts write it."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else _kind(part)
            raise ValueError(
                f"{where} has a content in parts, of which one is no text but {kind}: only text can be learnt, so take"
                " such parts or chats out"
            )
    return "".join(part["text"] for part in parts)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
