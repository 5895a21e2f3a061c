"""A transformers model: loaded whole, read, and put back as it was.

Knows no LoRA and no gate.

    loading.py          base models and tokenizers, loaded by transformers, whole or refused in one sentence
    backbone.py         its backbone, its last hidden state, its width
    first_layers.py     its first decoder layers, as a module that runs like the whole
    devices.py          where its parts compute
    state.py            what is changed in it for a time: flags, packed weights, hooks, modes
    likelihoods.py      how likely it finds each token of a text
    versions.py         what the versions of transformers and peft call or do differently
"""
