"""Generation token by token, with each expert's share.

There is no screen and no server here.

    stream.py           weft.stream, weft.generate: one step per token
    reader.py           runs a model on a text with a KV cache: logits, shares of the experts
    sampling.py         chooses the next token from the logits
    detokenizer.py      converts tokens, one at a time, to text that can be printed
    speculation.py      drafts tokens for speculative decoding
"""
