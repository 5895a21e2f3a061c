"""From tokens, one at a time, to text that can be printed: a character may need several tokens.

A token's text depends on its neighbours (the bytes of one character, the space before a word), so it is the difference
between the texts of a window of tokens with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What tokenizers give for bytes that are no character, or not yet.
_INCOMPLETE = "\ufffd"
# Tokens decoded again with each new one: at most _WINDOW, of which _CONTEXT stay. A character has at most four bytes.
_CONTEXT, _WINDOW = 16, 64


class Detokenizer:
    """Gives the text that each new token adds.

    The pieces together are what `tokenizer.decode` adds to the context's text when the new tokens come after it
    (without special tokens, and without "cleaning up" spaces, which would change what is printed already).

    Args:
        tokenizer: of transformers.
        context: the tokens before, whose text is not given again.

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
        """The new text that is certain with this token; "" in the middle of a character."""
        self._window.append(token)
        text = self._decode()
        certain = text.rstrip(_INCOMPLETE)
        # Bytes that turn out to be no character can take earlier ones with them, until a later token mends it.
        new = self._advance(certain) if certain.startswith(self._printed) else ""
        if len(self._window) >= _WINDOW and self._printed == text:
            self._window = self._window[-_CONTEXT:]
            self._printed = self._decode()
        return new

    def flush(self) -> str:
        """What was held back, incomplete as it is; for the end."""
        return self._advance(self._decode())

    def _advance(self, text: str) -> str:
        new, self._printed = text[len(self._printed) :], text
        return new

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
