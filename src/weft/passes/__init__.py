"""What happens around one call of the base model: who reads the text for the gate, and what the layers follow.

Knows no files and no training loop.

    base.py             scaling pass, gate and adapted pass; or one pass with the gate in it
    routings.py         from scalings to what the layers follow
    seq2seq.py          the same for encoder-decoders
    cache.py            the key/value caches of both passes as one object
    frozen.py           the mean scalings of each sequence so far, for a frozen gate
    gate_position.py    where in the base model the gate reads, and which layers follow it
    gate_losses.py      the gate's own losses in the loss of a call
    precomputed.py      a call that brings the result of its scaling pass
    recompute.py        gradient checkpointing that recomputes with the scalings of its own forward
    padding.py          which of the gate's positions hold something
    rows.py             rows of a batch that follow one expert each
    log.py              a bounded record of the scalings that passes used
    one_thread.py       one thread at a time
"""
