"""A saved mixture, or adapter, as values and tensors: read, checked against its manifest, and refused by name.

Knows no live model; making a model of a folder, and a folder of a model, is `model`'s.

    folder.py           a mixture's folder: what lies where; opened, read once and verified, as values
    adapters.py         LoRA adapters, from folders or the Hub
    adapter_keys.py     the names of their tensors, without what tools have put into them
    adapter_options.py  their options, by type and range
    manifest.py         what was saved, so that anything lost or altered since is named
    gate_sizes.py       a saved gate's sizes against its options
    xlora_layout.py     the original xlora library's layout
    mistralrs_layout.py that of mistral.rs
    licenses.py         what model cards declare
"""
