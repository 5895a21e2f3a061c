"""Files and folders: checked reading of files from outside, atomic writing of weft's own.

The content of a mixture's folder is described in `checkpoint`, not here.

    reading.py      reads JSON and text; each error names file, key, value and expectation
    tensors.py      reads and checks safetensors files
    writing.py      replaces a file or folder completely or not at all, also if the disk is full or on a kill
    failures.py     one clear error for a write that failed, of any library
    presence.py     whether what an option names is there
    ownership.py    what may be overwritten: only what weft wrote
    digests.py      sizes and digests of files, to find later changes
    names.py        valid names of experts, and name=VALUE
"""
