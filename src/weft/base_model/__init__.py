"""The base model, a transformers model: loaded, inspected, and restored after changes.

There are no LoRA layers and no gate here.

    loading.py          loads base models and tokenizers, and refuses incomplete ones
    backbone.py         the backbone, its last hidden state and its width
    first_layers.py     the first decoder layers of a backbone, as a module
    devices.py          the device of each part, also with accelerate's offloading
    state.py            saves and restores flags, packed weights, hooks and modes
    usage.py            seconds and peak memory
    likelihoods.py      the negative log-likelihood of each token
    versions.py         differences between versions of transformers and peft
"""
