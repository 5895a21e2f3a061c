"""Answers in OpenAI's format, whole or as stream events."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from weft.errors import first_line
from weft.serve.embedded.bodies import Wanted
from weft.serve.embedded.generating import Piece, TokenInfo
from weft.serve.requests import FIELD, RequestError

DONE = "data: [DONE]\n\n"
_LEAST = -9999.0  # for -inf, which JSON does not have; the same as in vLLM


class Answers:
    """The answer to one request, whole or as stream events.

    Args:
        wanted: the request.
        tokenizer: the base model's.
    """

    def __init__(self, wanted: Wanted, tokenizer: Any) -> None:
        self.wanted = wanted
        self._tokenizer = tokenizer
        self._generated = 0
        self._begun: set[int] = set()
        kind = "chat.completion" if wanted.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if wanted.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": wanted.model,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The whole answer.

        Args:
            pieces: all pieces of all choices.
        """
        by_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_choice.setdefault(piece.index, []).append(piece)
        choices = [self._choice(_joined(by_choice[index])) for index in sorted(by_choice)]
        if self.wanted.chat:
            for choice in choices:
                choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
        self._generated = sum(len(piece.tokens) for piece in pieces)
        return {**self._head, "choices": choices, "usage": self._usage(), **self._prompt_ids_of_chat()}

    def part(self, piece: Piece) -> str:
        """One event of a stream."""
        self._generated += len(piece.tokens)
        choice = self._choice(piece)
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        if self.wanted.chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": choice.pop("text")}
        elif not first:
            choice.pop("prompt_token_ids", None)
        return self._event({"choices": [choice], **(self._prompt_ids_of_chat() if first else {})})

    def ending(self) -> str:
        """The events after the last piece."""
        usage = self._event({"choices": [], "usage": self._usage()}) if self.wanted.usage else ""
        return usage + DONE

    def _event(self, content: dict[str, Any]) -> str:
        head = self._head | ({"object": "chat.completion.chunk"} if self.wanted.chat else {})
        usage = {"usage": None} if self.wanted.usage else {}
        return f"data: {json.dumps({**head, **usage, **content})}\n\n"

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None if self.wanted.logprobs is None else self._logprobs((*piece.prompt, *piece.tokens)),
            "finish_reason": piece.finish_reason,
        }
        if self.wanted.choice.shares:
            choice[FIELD] = {"shares": [info.shares for info in piece.tokens]}
        if self.wanted.token_ids:
            choice["token_ids"] = [info.token for info in piece.tokens]
            if not self.wanted.chat:
                choice["prompt_token_ids"] = list(self.wanted.prompts[piece.index // self.wanted.n].tokens)
        return choice

    def _prompt_ids_of_chat(self) -> dict[str, Any]:
        wanted = self.wanted
        return {"prompt_token_ids": list(wanted.prompts[0].tokens)} if wanted.chat and wanted.token_ids else {}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(prompt.tokens) for prompt in self.wanted.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        if self.wanted.chat:
            return {"content": [self._of_chat(one) for one in tokens], "refusal": None}
        return {
            "tokens": [self._text(one.token) for one in tokens],
            "token_logprobs": [None if one.logprob is None else _finite(one.logprob) for one in tokens],
            "top_logprobs": [self._alternatives(one) for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def _alternatives(self, info: TokenInfo) -> dict[str, float] | None:
        if info.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*info.alternatives, (info.token, info.logprob)):
            # Tokens that are parts of characters can have equal texts: the most likely one is kept.
            found.setdefault(self._text(token), _finite(logprob))
        return found

    def _of_chat(self, info: TokenInfo) -> dict[str, Any]:
        one = self._one(info.token, info.logprob or 0.0)
        return {**one, "top_logprobs": [self._one(*alternative) for alternative in info.alternatives]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        """The text of a token, as it is after other tokens."""
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        name = self._tokenizer.convert_ids_to_tokens(token)
        # Tokenizers with this symbol for a space remove the space at the start of a text.
        return f" {text}" if isinstance(name, str) and name.startswith("\u2581") and not text.startswith(" ") else text


def error_body(err: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body for an error."""
    if isinstance(err, RequestError) and err.status < 500:
        return err.status, err.body()
    message = f"{type(err).__name__}: {first_line(err)}" if not isinstance(err, RequestError) else str(err)
    return 500, {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}


def error_event(err: BaseException) -> str:
    """The events for an error during a stream, which end it."""
    return f"data: {json.dumps(error_body(err)[1])}\n\n{DONE}"


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        tuple(info for piece in pieces for info in piece.tokens),
        tuple(info for piece in pieces for info in piece.prompt),
        pieces[-1].finish_reason,
    )


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
