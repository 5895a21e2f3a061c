"""Conversations as token ids, rendered by the tokenizer's chat template.

The template writes all special tokens, so the tokenizer adds none, as in transformers'
`apply_chat_template(tokenize=True)`. All code of weft gets the tokens of a conversation from `conversation_tokens`.

The tokens of the assistant are marked by the template with `{% generation %}` and `{% endgeneration %}`. If it has no
such markers, they are found by rendering beginnings of the conversation. A turn of the assistant begins at the end of
the messages before it, rendered with a generation prompt. It ends at the end of the messages up to it. Both renderings
must be prefixes of the whole conversation. Some templates render an earlier answer in another way than the last one:
they drop its reasoning, or end the conversation with a special token. Then the answer is replaced by a fixed text. The
text that the template writes after it, both as the last message and in the whole conversation, is the end of the turn.
"""

from __future__ import annotations

import json
import re
from typing import Any

from weft.errors import DataError
from weft.files.reading import has_surrogate, shown

# Replaces an answer. Templates do not change such a text.
_STAND_IN = "(an answer)"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_tokens(
    tokenizer: Any, messages: list[Any], *, add_generation_prompt: bool = False, **options: Any
) -> list[int]:
    """Return the token ids of a conversation.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dicts with "role", and "content" or other keys of the template.
        add_generation_prompt: end with the template's beginning of an answer.
        **options: `tools`, and other variables of the template.

    Raises:
        Exception: any error, as a template is a program.

    Example:
        >>> conversation_tokens(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    """
    encoded = _applied(tokenizer, messages, add_generation_prompt=add_generation_prompt, **options)
    return list(encoded["input_ids"])


def assistant_mask(tokenizer: Any, messages: list[Any], **options: Any) -> list[bool]:
    """Return for each of `conversation_tokens` whether it is in a turn of the assistant, including the turn's end.

    Args:
        tokenizer: a "fast" tokenizer with a chat template.
        messages: as for `conversation_tokens`.
        **options: as for `conversation_tokens`.

    Raises:
        DataError: the tokens of the assistant cannot be found.
        Exception: any error of the template.
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
    """The first character of an assistant's turn in the whole conversation, and the one after its last."""
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
            f"message {index + 1}, or the text before it, when the conversation continues; {advice}"
        )
    return len(before), end


def _end(tokenizer: Any, messages: list[Any], index: int, whole: str, options: dict[str, Any]) -> int | None:
    """The index of the character after a message in the whole conversation; None if it cannot be found."""
    until = _rendered(tokenizer, messages[: index + 1], **options)
    if whole.startswith(until):
        return len(until)
    if not isinstance(messages[index].get("content"), str):
        return None
    marked = [*messages[:index], {**messages[index], "content": _STAND_IN}, *messages[index + 1 :]]
    _, in_last, ending = _rendered(tokenizer, marked[: index + 1], **options).partition(_STAND_IN)
    _, in_whole, rest = _rendered(tokenizer, marked, **options).partition(_STAND_IN)
    if not rest.startswith(ending):
        ending = ending.removesuffix(tokenizer.eos_token or "")  # the end of the conversation
    if not (in_last and in_whole and ending and rest.startswith(ending) and whole.endswith(rest)):
        return None
    return len(whole) - len(rest) + len(ending)


def check_messages(tokenizer: Any, messages: list[Any], **options: Any) -> None:
    """Raise if the messages are not a conversation, or if the template would leave parts of it out.

    Contents that are lists of parts are tested by rendering unique texts: a template that supports only strings leaves
    such contents out, or prints the list as Python or JSON.

    Raises:
        DataError: with the message and the reason.
        Exception: any error of the template.
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
    """Raise if a text, or a text in a list or dict, has a lone surrogate, which JSON's escapes can write.

    Raises:
        DataError: it has, so a tokenizer cannot read it.
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
    """Whether a message is the result of a tool, whose content may be any list."""
    parts = [part for part in message["content"] if isinstance(part, dict) and "type" in part]
    return message["role"] == "tool" and not parts


def _rendered(tokenizer: Any, messages: list[Any], **options: Any) -> str:
    refuse_half_characters([messages, options])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _applied(tokenizer: Any, messages: list[Any], **options: Any) -> Any:
    refuse_half_characters([messages, options])
    # Not verbose: no warning for a long conversation, which is cut later.
    return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs={"verbose": False}, **options)
