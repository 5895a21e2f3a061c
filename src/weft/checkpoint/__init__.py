"""A saved mixture or adapter as values and tensors: read, and checked against its manifest.

There are no models here: `model` builds a model from a folder and saves a model to a folder.

    folder.py           the layout of a mixture's folder; opens it, reads its files once and verifies them
    base_place.py       where a mixture's base model is, also if the folders were moved
    adapters.py         reads LoRA adapters from folders or the Hub
    adapter_keys.py     the keys of an adapter's tensors, without prefixes that other tools add
    adapter_options.py  checks the types and ranges of an adapter's options
    manifest.py         the digests of what was saved, to find what was lost or changed
    gate_sizes.py       checks the sizes of a saved gate against its options
    xlora_layout.py     the layout of the original xlora library
    mistralrs_layout.py the layout of mistral.rs
    licenses.py         the licence in a model card
"""
