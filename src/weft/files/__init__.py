"""Files and folders: what others wrote is read with one clear error, what weft writes is there whole or not at all.

Knows no format of weft's: what a mixture's folder holds is `checkpoint`'s.

    reading.py      JSON, text and what else others wrote: file, key, value and expectation in each error
    tensors.py      safetensors files, read whole or named as broken
    writing.py      files and folders replaced whole, also when the disk is full or the process is killed
    ownership.py    what may be written over: nothing that weft did not write
    digests.py      sizes and digests, by which a change after saving is found
    names.py        which names experts, and so folders, can have; name=VALUE
"""
