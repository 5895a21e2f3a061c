"""One call of the base model: the scaling pass, the gate, and the adapted pass.

There are no files and no training loop here.

    base.py             scaling pass, gate and adapted pass; or one pass with the gate in it
    routings.py         converts scalings to the `Routing` that the layers use
    seq2seq.py          the passes of encoder-decoders
    cache.py            the KV caches of both passes as one object
    frozen.py           the mean scalings of each sequence so far, for a frozen gate
    gate_position.py    the position of the gate in the base model, and the first layer that uses its scalings
    scaling_lora.py     the linear layers of the scaling pass, to which the gate's own LoRA adds
    gate_losses.py      adds the gate's losses to the loss of a call
    precomputed.py      a call with a precomputed result of the scaling pass
    recompute.py        gradient checkpointing that recomputes with the scalings of the original forward
    padding.py          the attention mask of the gate's positions
    rows.py             rows of a batch that each use one expert
    log.py              a bounded log of scalings
    one_thread.py       allows one thread at a time
"""
