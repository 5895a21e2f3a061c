"""Text from a mixture, token by token, with what each expert had to do with it.

Knows no screen and no server.

    stream.py           weft.stream, weft.generate: reading and writing, a step per token
    reader.py           a model reads a text into its cache: logits, shares of the experts
    sampling.py         logits -> the next token
    detokenizer.py      tokens, one at a time -> text that can be printed
    speculation.py      drafts of the coming tokens, several of which one call checks
"""
