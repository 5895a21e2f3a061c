"""Reads and checks the body of a request to /v1/completions or /v1/chat/completions.

A field that would change the answer but is not supported is refused, and so is an unknown field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.data.chat_template import check_messages, conversation_tokens, refuse_half_characters
from weft.data.texts import prompt_tokens
from weft.errors import WeftError, first_line
from weft.files.reading import shown
from weft.serve.embedded.fields import Fields
from weft.serve.requests import FIELD, Choice, RequestError, Served, refuse_beside_shares

_MOST_CHOICES = 128  # maximum number of choices for a prompt
_MOST_TEXTS = 4096  # maximum number of texts in an answer
_MOST_ALTERNATIVES = 20  # maximum number of alternatives for a token, as in vLLM
_MOST_STOPS = 16
# Default numbers of new tokens: for texts OpenAI's; for chats all free positions, or this if there is no limit.
_TEXT_TOKENS, _CHAT_TOKENS = 16, 4096
# At lower temperatures the most likely token is taken, as in vLLM.
_LEAST_TEMPERATURE = 1e-5
# Fields that do not change the answer.
_HARMLESS = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction", "cache_salt"),
)
# Fields that are not supported -> values that are allowed because they change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
}
_REFUSED_IN_TEXTS: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
_REFUSED_IN_CHATS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}


@dataclass(frozen=True)
class Reads:
    """What is needed to read a request.

    Attributes:
        served: the model names.
        tokenizer: the base model's tokenizer.
        num_tokens: size of the model's vocabulary.
        positions: number of the model's positions; None for no limit.
        characters: maximum number of characters of a text that can fit into these positions; None for no limit.
        text_ends: tokens that end a text.
        chat_ends: tokens that end an answer of a chat.
    """

    served: Served
    tokenizer: Any
    num_tokens: int
    positions: int | None
    characters: int | None
    text_ends: frozenset[int]
    chat_ends: frozenset[int]


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: its tokens.
        text: its text, as it was sent or decoded from the tokens.
        max_tokens: maximum number of new tokens.
    """

    tokens: tuple[int, ...]
    text: str
    max_tokens: int


@dataclass(frozen=True)
class Wanted:
    """A request that was read and checked.

    Attributes:
        chat: whether it is for /v1/chat/completions.
        model: the model name in the request.
        choice: the options for the mixture.
        prompts: one or more prompts.
        n: number of choices for each prompt.
        temperature, top_k, top_p, repetition_penalty, seed: options of `Sampler`.
        stop: strings that end a text.
        ends: tokens that end a text.
        logprobs: number of alternatives with each token's log-probability; None for no log-probabilities.
        echo: whether the answer includes the prompt.
        stream: whether the answer is streamed.
        usage: whether the stream has a last event with the numbers of tokens.
        token_ids: whether the answer has token ids.
    """

    chat: bool
    model: str
    choice: Choice
    prompts: tuple[Prompt, ...]
    n: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]
    ends: frozenset[int]
    logprobs: int | None
    echo: bool
    stream: bool
    usage: bool
    token_ids: bool


def read_body(body: Any, reads: Reads, *, chat: bool) -> Wanted:
    """Read and check a body.

    Args:
        body: the parsed JSON.
        reads: for reading requests.
        chat: whether it is for /v1/chat/completions.

    Raises:
        RequestError: a field is missing, unknown, not valid or not supported.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"the body ({shown(body)}) must be a JSON object", "body")
    try:
        refuse_half_characters(body)
    except WeftError as err:
        raise RequestError(str(err), "body") from err
    fields = Fields(body)
    model = fields.take("model")
    choice = reads.served.choice(model, fields.take(FIELD))
    echo = False if chat else fields.flag("echo")
    max_tokens = _max_tokens(fields, chat=chat, echo=echo)
    n = fields.whole("n", 1, least=1, most=_MOST_CHOICES) or 1
    _check_best_of(fields, n)
    logprobs = _alternatives_of_chat(fields) if chat else fields.whole("logprobs", None, 0, _MOST_ALTERNATIVES)
    temperature = fields.number("temperature", 1.0)
    top_k = fields.whole("top_k", None, least=-1)
    stream = fields.flag("stream")
    ends = reads.chat_ends if chat else reads.text_ends
    given = _messages(fields, reads) if chat else _texts(fields, reads, n)
    wanted = Wanted(
        chat=chat,
        model=model or reads.served.name,
        choice=choice,
        prompts=tuple(_fitted(tokens, text, max_tokens, reads, chat=chat) for tokens, text in given),
        n=n,
        temperature=temperature if temperature > _LEAST_TEMPERATURE else 0.0,
        top_k=top_k if top_k is not None and top_k > 0 else None,
        top_p=fields.number("top_p", 1.0, above=0.0, most=1.0),
        repetition_penalty=fields.number("repetition_penalty", 0.0, above=0.0) or None,
        seed=fields.whole("seed", None, least=-(2**63)),
        stop=fields.strings("stop", _MOST_STOPS),
        ends=frozenset() if fields.flag("ignore_eos") else ends,
        logprobs=logprobs,
        echo=echo,
        stream=stream,
        usage=_usage(fields, stream),
        token_ids=fields.flag("return_token_ids"),
    )
    for name, neutral in (_REFUSED | (_REFUSED_IN_CHATS if chat else _REFUSED_IN_TEXTS)).items():
        fields.refuse(name, *neutral)
    fields.ignore(*_HARMLESS)
    fields.refuse_the_rest()
    if choice.shares:
        refuse_beside_shares(
            n=(wanted.n > 1, "1"), prompt=(len(wanted.prompts) > 1, "one text"), echo=(wanted.echo, "false")
        )
    return wanted


def _max_tokens(fields: Fields, *, chat: bool, echo: bool) -> int | None:
    least = 0 if echo else 1
    value = fields.whole("max_tokens", None, least)
    newer = fields.whole("max_completion_tokens", None, least) if chat else None
    return value if newer is None else newer


def _check_best_of(fields: Fields, n: int) -> None:
    best_of = fields.whole("best_of", None, least=1)
    if best_of not in (None, n):
        raise RequestError(
            f"best_of ({best_of}) is not supported by the embedded engine, which returns all that it makes, n ({n}): "
            "leave it out",
            "best_of",
        )


def _alternatives_of_chat(fields: Fields) -> int | None:
    asked = fields.flag("logprobs")
    number = fields.whole("top_logprobs", None, 0, _MOST_ALTERNATIVES)
    if number and not asked:
        raise RequestError(f"top_logprobs ({number}) needs logprobs (False) to be true", "top_logprobs")
    return (number or 0) if asked else None


def _usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options")
    if options is None:
        return False
    if not isinstance(options, Mapping):
        raise RequestError(f"stream_options ({shown(options)}) must be an object", "stream_options")
    if not stream:
        raise RequestError(f"stream_options ({shown(options)}) needs stream (False) to be true", "stream_options")
    inside = Fields(options, "stream_options.")
    usage = inside.flag("include_usage")
    inside.ignore("include_obfuscation")
    inside.refuse("continuous_usage_stats", False)
    inside.refuse_the_rest()
    return usage


def _texts(fields: Fields, reads: Reads, n: int) -> list[tuple[list[int], str]]:
    """(tokens, text) of each prompt."""
    prompt = fields.take("prompt")
    if prompt is None:
        raise RequestError("prompt is missing: a text, token ids, or a list of either", "prompt")
    single = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and all(map(_is_id, prompt)))
    prompts = [prompt] if single else prompt
    if not isinstance(prompts, list) or not prompts:
        raise RequestError(f"prompt ({shown(prompt)}) must be a text, token ids, or a list of either", "prompt")
    texts = len(prompts) * n
    if texts > _MOST_TEXTS:
        raise RequestError(
            f"prompt ({len(prompts)} of them) and n ({n}) ask for {texts} texts, expected at most {_MOST_TEXTS}",
            "prompt",
        )
    return [_text(one, reads) for one in prompts]


def _text(prompt: Any, reads: Reads) -> tuple[list[int], str]:
    if isinstance(prompt, str):
        _check_length(len(prompt), reads, "prompt")
        tokens, text = prompt_tokens(prompt, reads.tokenizer), prompt
    elif isinstance(prompt, list) and all(map(_is_id, prompt)):
        wrong = [token for token in prompt if not 0 <= token < reads.num_tokens]
        if wrong:
            raise RequestError(
                f"prompt has the token id {shown(wrong[0])}, expected 0 to {reads.num_tokens - 1}", "prompt"
            )
        tokens = prompt
        text = reads.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    else:
        raise RequestError(f"prompt has {shown(prompt)}, expected a text or a list of token ids", "prompt")
    if not tokens:
        raise RequestError(f"prompt ({shown(prompt)}) has no tokens, expected at least one to continue", "prompt")
    return tokens, text


def _check_length(characters: int, reads: Reads, field: str) -> None:
    """Raise if a text is too long for the model's positions in any case, so that it need not be tokenized."""
    if reads.characters is not None and characters > reads.characters:
        raise RequestError(
            f"{field} ({characters:,} characters) must be shorter: the model has {reads.positions} positions, for "
            f"which {reads.characters:,} characters are too many in any text",
            field,
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # the range is checked later


def _messages(fields: Fields, reads: Reads) -> list[tuple[list[int], str]]:
    """The tokens of a conversation."""
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages ({shown(messages)}) must be a list of one or more", "messages")
    tokenizer = reads.tokenizer
    if tokenizer.chat_template is None:
        raise RequestError(
            f"model {reads.served.name!r} has a base model without a chat template, so it cannot chat: use "
            "/v1/completions",
            "messages",
        )
    cleaned = [_message(message, f"messages[{number}].") for number, message in enumerate(messages)]
    _check_length(sum(len(str(message)) for message in cleaned), reads, "messages")
    try:
        check_messages(tokenizer, cleaned)
        tokens = conversation_tokens(tokenizer, cleaned, add_generation_prompt=True)
    except WeftError as err:
        raise RequestError(str(err), "messages") from err
    except Exception as err:  # a template is a program and may raise anything
        raise RequestError(f"the chat template refuses the messages: {first_line(err)}", "messages") from err
    if not tokens:
        raise RequestError("messages have no tokens, expected at least one to answer", "messages")
    return [(tokens, "")]


def _message(message: Any, where: str) -> Any:
    """A message without null values."""
    if not isinstance(message, Mapping):
        return message  # `check_messages` refuses it
    fields = Fields(message, where)
    for name, *neutral in (("tool_calls", []), ("function_call",), ("tool_call_id",), ("audio",), ("refusal",)):
        fields.refuse(name, *neutral)
    fields.ignore("role", "content", "name")
    fields.refuse_the_rest()
    return {name: value for name in ("role", "content", "name") if (value := message.get(name)) is not None}


def _fitted(tokens: list[int], text: str, max_tokens: int | None, reads: Reads, *, chat: bool) -> Prompt:
    """The prompt with its maximum number of new tokens.

    Raises:
        RequestError: the model does not have enough positions.
    """
    room = None if reads.positions is None else reads.positions - len(tokens)
    if room is not None and (room < (max_tokens or 0) or (room < 1 and max_tokens != 0)):
        new = f"max_tokens ({1 if max_tokens is None else max_tokens})"
        raise RequestError(
            f"the prompt ({len(tokens)} tokens) and {new} need {len(tokens) + (max_tokens or 1)} positions, and the "
            f"model has {reads.positions}: shorten the prompt, or ask for fewer tokens",
            "messages" if chat else "prompt",
        )
    if max_tokens is None:
        default = _CHAT_TOKENS if chat else _TEXT_TOKENS
        max_tokens = default if room is None else room if chat else min(default, room)
    return Prompt(tuple(tokens), text, max_tokens)
