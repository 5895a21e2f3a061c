"""Conversations as a model reads them: rendered by its tokenizer's chat template, and tokenised as they are rendered.

A template writes the beginning of a conversation and the ends of its turns itself, so the tokenizer adds none of its
own, as in transformers' `apply_chat_template(tokenize=True)`. Whatever here reads or writes a conversation gets its
tokens from `conversation_tokens`.

Which of them are the assistant's a template says by its markers, `{% generation %}` and `{% endgeneration %}`. Without
markers it is what the assistant would have written in a chat: a turn begins where the conversation before it, rendered
to be answered, ends, and it ends where the conversation up to it does. These renderings have to be beginnings of the
whole one. Where a template writes an answer in another way once the conversation goes on, as those do that drop the
reasoning of earlier answers or end a conversation with a token of its own, it ends with what stands behind another
answer in its place, both as the last message and in the whole conversation.
"""

from __future__ import annotations

import json
import re
from typing import Any

from weft.errors import DataError
from weft.files.reading import has_surrogate, shown

# An answer that no template has a reason to change, in the place of one.
_STAND_IN = "(an answer)"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_tokens(
    tokenizer: Any, messages: list[Any], *, add_generation_prompt: bool = False, **options: Any
) -> list[int]:
    """The tokens of a conversation.

    Args:
        tokenizer: with a chat template.
        messages: dicts with "role", and "content" or what else the template knows.
        add_generation_prompt: end with what the template writes before an answer.
        **options: `tools`, and what else the template knows.

    Raises:
        Exception: any, from the template, which is a program of its own.

    Example:
        >>> conversation_tokens(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    """
    encoded = _applied(tokenizer, messages, add_generation_prompt=add_generation_prompt, **options)
    return list(encoded["input_ids"])


def assistant_mask(tokenizer: Any, messages: list[Any], **options: Any) -> list[bool]:
    """Whether each of `conversation_tokens` is of a turn of the assistant's, its end included.

    Args:
        tokenizer: a "fast" one, with a chat template.
        messages: as for `conversation_tokens`.
        **options: as for `conversation_tokens`.

    Raises:
        DataError: the template does not say which they are.
        Exception: any, from the template.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError('assistant_only_loss (True) needs a tokenizer that knows its tokens\' places (a "fast" one)')
    if _MARKER.search(tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))):
        encoded = _applied(tokenizer, messages, return_assistant_tokens_mask=True, **options)
        return [bool(one) for one in encoded["assistant_masks"]]
    whole = _rendered(tokenizer, messages, **options)
    turns = [
        _turn(tokenizer, messages, index, whole, options)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    offsets = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    turns = [(first, end) for first, end in turns if first < end]
    return [any(start < end and first < stop for first, end in turns) for start, stop in offsets]


def _turn(tokenizer: Any, messages: list[Any], index: int, whole: str, options: dict[str, Any]) -> tuple[int, int]:
    """From which character of the whole conversation to which a turn is the assistant's."""
    advice = (
        "put {% generation %} and {% endgeneration %} around what the assistant writes, in the base model's "
        "chat_template.jinja"
    )
    if index == 0:
        raise DataError(
            "assistant_only_loss (True) cannot tell which tokens are the assistant's where its turn is the first: "
            f"{advice}, or let another turn be the first"
        )
    before = _rendered(tokenizer, messages[:index], add_generation_prompt=True, **options)
    end = _end(tokenizer, messages, index, whole, options)
    if end is None or not whole[:end].startswith(before):
        raise DataError(
            "assistant_only_loss (True) cannot tell which tokens are the assistant's: the chat template changes "
            f"message {index + 1}, or what stands before it, when the conversation goes on; {advice}"
        )
    return len(before), end


def _end(tokenizer: Any, messages: list[Any], index: int, whole: str, options: dict[str, Any]) -> int | None:
    """The character of the whole conversation before which a message ends; None where that cannot be told."""
    until = _rendered(tokenizer, messages[: index + 1], **options)
    if whole.startswith(until):
        return len(until)
    if not isinstance(messages[index].get("content"), str):
        return None
    marked = [*messages[:index], {**messages[index], "content": _STAND_IN}, *messages[index + 1 :]]
    _, is_last, ending = _rendered(tokenizer, marked[: index + 1], **options).partition(_STAND_IN)
    _, is_there, rest = _rendered(tokenizer, marked, **options).partition(_STAND_IN)
    if not rest.startswith(ending):
        ending = ending.removesuffix(tokenizer.eos_token or "")  # of the conversation
    if not (is_last and is_there and ending and rest.startswith(ending) and whole.endswith(rest)):
        return None
    return len(whole) - len(rest) + len(ending)


def check_messages(tokenizer: Any, messages: list[Any], **options: Any) -> None:
    """Raise where a template would be given what is no conversation, or would leave a part of one out.

    Contents that are lists of parts are tried with texts that can be found again: a template that knows strings only
    leaves such contents out, or prints them as Python or JSON does.

    Raises:
        DataError: says which message, and why.
        Exception: any, from the template.
    """
    probes: dict[int, list[dict[str, str]]] = {}
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'message {number} ({shown(message)}) must be an object with "role" and "content"')
        if all(value is None for name, value in message.items() if name != "role"):
            raise DataError(f'message {number} ({shown(message)}) has no "content", expected a string')
        content = message.get("content")
        if isinstance(content, list) and not _is_result(message):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise DataError(
                        f'message {number} has the part {part!r}, expected {{"type": "text", "text": ...}}: weft reads '
                        "text only"
                    )
            probes[number - 1] = [
                {"type": "text", "text": f"(part {part} of message {number})"} for part in range(1, len(content) + 1)
            ]
    if not probes:
        return
    tried = [
        {**message, "content": probes[index]} if index in probes else message for index, message in enumerate(messages)
    ]
    rendered = _rendered(tokenizer, tried, **options)
    for index, parts in probes.items():
        if any(part["text"] not in rendered or str(part) in rendered or json.dumps(part) in rendered for part in parts):
            raise DataError(
                f'message {index + 1} has a list of parts as its "content", which the chat template does not know: '
                "give it as one string"
            )


def refuse_half_characters(value: Any) -> None:
    """Raise where a text, or one in a list or object, holds half of a character, as JSON's escapes can write it.

    Raises:
        DataError: it does: a tokenizer cannot read it.
    """
    if isinstance(value, str):
        if has_surrogate(value):
            index = next(number for number, character in enumerate(value) if has_surrogate(character))
            raise DataError(
                f"the text {shown(value[max(0, index - 20) : index + 20])} holds half of a character "
                f"({ascii(value[index])[1:-1]}, a lone surrogate): expected whole ones"
            )
    elif isinstance(value, dict):
        refuse_half_characters([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            refuse_half_characters(one)


def _is_result(message: dict[str, Any]) -> bool:
    """Whether a content is what a tool has answered, which may be any list."""
    parts = [part for part in message["content"] if isinstance(part, dict) and "type" in part]
    return message["role"] == "tool" and not parts


def _rendered(tokenizer: Any, messages: list[Any], **options: Any) -> str:
    refuse_half_characters([messages, options])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _applied(tokenizer: Any, messages: list[Any], **options: Any) -> Any:
    refuse_half_characters([messages, options])
    # A long conversation is cut later.
    return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs={"verbose": False}, **options)
