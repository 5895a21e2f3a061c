"""Converts tokens, one at a time, to text that can be printed. A character may need several tokens.

The text of a token depends on its neighbours (the bytes of a character, the space before a word). So it is computed as
the difference between the texts of a window of tokens with and without the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The text of bytes that are not a valid character, or not yet.
_INCOMPLETE = "\ufffd"
# At most _WINDOW tokens are decoded with each new one; then all except _CONTEXT are dropped from the window.
_CONTEXT, _WINDOW = 16, 64


class Detokenizer:
    """Returns the text that each new token adds.

    All pieces together are the text that `tokenizer.decode` adds to the context's text for the new tokens, without
    special tokens, and without "cleaning up" spaces, which would change text that is printed already.

    Args:
        tokenizer: a tokenizer of transformers.
        context: the tokens before, whose text is not returned.

    Example:
        >>> detokenizer = Detokenizer(tokenizer)
        >>> [detokenizer.add(token) for token in tokenizer("naïve").input_ids]
        ['n', 'a', '', 'ï', 'v', 'e']
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._window = list(context[-_CONTEXT:])
        self._printed = self._decode().rstrip(_INCOMPLETE)

    def add(self, token: int) -> str:
        """Add a token; returns the new text that cannot change any more, "" inside a character."""
        self._window.append(token)
        text = self._decode()
        certain = text.rstrip(_INCOMPLETE)
        # Invalid bytes can change the decoding of earlier bytes, until a later token completes a character.
        new = self._advance(certain) if certain.startswith(self._printed) else ""
        if len(self._window) >= _WINDOW and self._printed == text:
            self._window = self._window[-_CONTEXT:]
            self._printed = self._decode()
        return new

    def flush(self) -> str:
        """The remaining text at the end, which may be incomplete."""
        return self._advance(self._decode())

    def _advance(self, text: str) -> str:
        new, self._printed = text[len(self._printed) :], text
        return new

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
