"""`weft chat`: a conversation in the terminal. In each turn the model reads only the new tokens."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import torch
from transformers import Cache

from weft.base_model.loading import loading_options
from weft.base_model.versions import can_crop, is_recurrent
from weft.cli.parser import did_you_mean
from weft.cli.terminal import StepPrinter
from weft.data.chat_template import conversation_tokens
from weft.data.texts import num_positions
from weft.errors import ConfigError, WeftError, first_line
from weft.files.reading import shown
from weft.generation.sampling import check_decoding
from weft.generation.stream import Step, end_tokens, stream
from weft.model.build import load_mixture
from weft.options import ChatOptions, decoding
from weft.passes.cache import tokens_in
from weft.screen.visible import notice, say

_COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation",
    "/experts": "show or hide each token's leading expert",
    "/quit": "end the chat",
}
_HELP = "\n".join(f"{name:<10}{what}" for name, what in _COMMANDS.items())
_HELP += "\n// or a space before a line that begins with / sends it as text"


class TooLongError(ConfigError):
    """The model has too few positions for the conversation with a message, which is not in it then."""


class Conversation:
    """The messages so far, and the KV cache of both passes.

    The chat template is applied to the whole conversation in each turn, as a template may change earlier turns. The
    cache is kept for the longest common prefix of the old and the new tokens.

    Args:
        model: a mixture.
        tokenizer: its tokenizer, with a chat template.
        options: the options of `weft chat`.

    Raises:
        ConfigError: the tokenizer has no chat template.

    Example:
        >>> conversation = Conversation(model, tokenizer, ChatOptions("my-mixture"))
        >>> "".join(step.text for step in conversation.reply("Who are you?"))
    """

    def __init__(self, model: Any, tokenizer: Any, options: ChatOptions) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"model ({options.model}) has a base model whose tokenizer has no chat template: expected a base that "
                "was trained to chat; continue texts with `weft generate`, or put a chat_template.jinja into the "
                "base's folder"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        # The base model's end of text, and the tokenizer's token at the end of a message.
        ends = end_tokens(model.get_base_model().generation_config.eos_token_id) | end_tokens(tokenizer.eos_token_id)
        self._eos_token_id = sorted(ends)
        self.reset()

    def reset(self) -> None:
        """Remove all messages except the system prompt."""
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        # The tokens so far. The cache has not read the last token of an answer, nor some more after Ctrl-C.
        self._read: list[int] = []
        self._cache: Cache = self.model.base_model.backbone.empty_cache()

    def reply(self, text: str) -> Generator[Step, None, None]:
        """Yield the steps of an answer. If it is stopped early, the conversation keeps the part so far.

        Raises:
            ConfigError: the template raises an error for the messages.
            TooLongError: the model has no positions left.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        token_ids = self._token_ids(messages)
        positions = num_positions(self.model.get_base_model().config)
        if positions is not None and len(token_ids) > positions:
            raise TooLongError(
                f"not sent: the conversation has {len(token_ids):,} tokens with it, expected at most {positions:,}: "
                "shorten it, or /reset"
            )
        self._keep_common_beginning(token_ids)
        steps = stream(
            self.model,
            torch.tensor([token_ids]),
            tokenizer=self.tokenizer,
            seed=self.options.seed + len(messages),  # not the same random numbers in every turn
            eos_token_id=self._eos_token_id,
            past_key_values=self._cache,
            speculate=self.options.speculate,
            **decoding(self.options),
        )
        self.messages, self._read = messages, token_ids
        answer = ""
        try:
            for step in steps:
                self._read.append(step.token)
                answer += step.text
                yield step
        finally:
            self.messages.append({"role": "assistant", "content": answer})

    def _token_ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return conversation_tokens(self.tokenizer, messages, add_generation_prompt=True)
        except WeftError:
            raise
        except Exception as err:  # a template is a program and can raise any error
            raise ConfigError(
                f"the chat template refuses the conversation ({', '.join(message['role'] for message in messages)}): "
                f"{first_line(err)}"
            ) from err

    def _keep_common_beginning(self, token_ids: list[int]) -> None:
        if is_recurrent(self._cache):  # its number of tokens is not known
            self._cache = self.model.base_model.backbone.empty_cache()
            return
        cached = self._read[: tokens_in(self._cache)]
        common = 0
        # The last token is always read again, as its logits are needed.
        for one, other in zip(cached, token_ids[:-1], strict=False):
            if one != other:
                break
            common += 1
        if common == len(cached):
            return
        cache, self._cache = self._cache, self.model.base_model.backbone.empty_cache()
        # A sliding window or a recurrent state cannot be cropped: then the new cache stays empty.
        if can_crop(cache):
            with suppress(RuntimeError):
                cache.crop(common - len(cached))
                self._cache = cache


def chat(options: ChatOptions) -> None:
    """Answer the lines of the standard input until it ends or a line is /quit.

    Raises:
        WeftError: the model or the options are not valid; or, if the input is no terminal, a line cannot be answered,
            at once, or at the end if it was too long.
    """
    check_decoding(**decoding(options))
    model, tokenizer = load_mixture(options.model, options.base, **loading_options(options))
    conversation = Conversation(model, tokenizer, options)
    experts = model.xlora_config.expert_names
    printer = StepPrinter(experts, show_experts := options.show_experts)
    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
        notice("/help lists the commands, Ctrl-C stops an answer", file=sys.stderr)
    printer.legend()
    unsent = 0
    while (line := _line("> " if interactive else "")) is not None:
        command, text = _command_and_text(line)
        if command in ("/quit", "/exit"):
            break
        if command == "/help":
            say(_HELP)
        elif command == "/reset":
            conversation.reset()
        elif command == "/experts":
            printer = StepPrinter(experts, show_experts := not show_experts)
            printer.legend()
        elif command:
            _refuse(_unknown(command), interactive)
        elif text:
            if not interactive:
                notice(f"> {text}")  # on a terminal the user sees it
            try:
                _answer(conversation, text, printer)
            except TooLongError as err:
                unsent += 1
                say(str(err), file=sys.stderr)
            except WeftError as err:
                _refuse(err, interactive, "\n(/reset forgets the conversation)")
    if unsent and not interactive:
        raise ConfigError(f"{unsent} of the messages were not sent, see above")


def _edit_lines() -> None:
    """Let arrow keys edit a line and recall earlier lines, which are kept in memory only."""
    with suppress(ImportError):  # on Windows, where the terminal does this
        import readline  # noqa: F401  the import changes `input`


def _line(prompt: str) -> str | None:
    """The next line; None at the end. After a prompt Ctrl-C clears the line, and a second one ends the chat."""
    interrupted = False
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if interrupted or not prompt:
                raise
            interrupted = True
            say("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)", file=sys.stderr)


def _command_and_text(line: str) -> tuple[str, str]:
    """Split a line into (command, text for the model); one of them is empty."""
    text = line.strip()
    if line.startswith("//"):
        return "", text[1:]
    return (text, "") if line.startswith("/") else ("", text)


def _unknown(command: str) -> ConfigError:
    near = did_you_mean(command.split(maxsplit=1)[0], _COMMANDS)
    return ConfigError(f"{shown(command)} is no command{near} (/help lists them; a space before it sends it as text)")


def _refuse(err: WeftError, interactive: bool, hint: str = "") -> None:
    """Raise the error in a script; print it on a terminal."""
    if not interactive:
        raise err
    say(f"{err}{hint}", file=sys.stderr)


def _answer(conversation: Conversation, text: str, printer: StepPrinter) -> None:
    steps = conversation.reply(text)
    try:
        for step in steps:
            printer.add(step)
    except KeyboardInterrupt:
        steps.close()
    printer.end()
