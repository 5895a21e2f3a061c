"""What can happen to a folder, a file, a table of JSON or a file of tensors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .hostile import BYTES, KEYS, RAW, VALUES

_MARK = "@@raw@@"
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


def mutate_folder(folder: Path, outside: Path, rng: random.Random) -> list[str]:
    """Change one to three things in a folder; says what."""
    return [_mutate_once(folder, outside, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]


def _mutate_once(folder: Path, outside: Path, rng: random.Random) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return "nothing left"
    file = rng.choice(files)
    name = file.relative_to(folder)
    # A file that an earlier mutation has broken has bytes alone.
    with contextlib.suppress(ValueError, OSError, SafetensorError, LookupError, RuntimeError, TypeError, struct.error):
        if file.suffix == ".json" and rng.random() < 0.7:
            return f"{name}: {mutate_json(file, rng)}"
        if file.suffix == ".safetensors" and rng.random() < 0.7:
            return f"{name}: {mutate_tensors(file, rng)}"
    if not os.access(file, os.R_OK):
        return f"{name}: as it is"
    if rng.random() < 0.6:
        return f"{name}: {mutate_bytes(file, rng)}"
    return f"{name}: {replace(file, folder, outside, rng)}"


def mutate_bytes(file: Path, rng: random.Random) -> str:
    """Change a file's bytes."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "truncate", "append", "insert", "whole", "zero"])
    place = rng.randrange(len(data)) if data else 0
    if kind == "flip" and data:
        for _ in range(rng.choice([1, 1, 8])):
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[place:]
    elif kind == "append":
        data += rng.choice(BYTES) or b"\x00"
    elif kind == "insert":
        data[place:place] = rng.choice(BYTES)
    elif kind == "whole":
        data = bytearray(rng.choice(BYTES))
    else:
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    file.write_bytes(bytes(data))
    return f"{kind} at {place}"


def replace(file: Path, folder: Path, outside: Path, rng: random.Random) -> str:
    """Put something that is no such file in a file's place."""
    kind = rng.choice(
        ["gone", "folder", "link out", "link up", "loop", "dangling", "pipe", "large", "forbidden", "locked"]
    )
    if kind == "forbidden":
        file.chmod(0)
        return kind
    if kind == "locked":
        file.parent.chmod(0o300 if file.parent != folder else 0o700)
        return kind
    if kind == "large":
        with file.open("ab") as opened:
            opened.truncate(2**28)
        return kind
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "link out":
        file.symlink_to(outside / "secret.json")
    elif kind == "link up":
        file.symlink_to("..")
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(file)
    return kind


def mutate_json(file: Path, rng: random.Random) -> str:
    """Change a value, a key or the whole of a JSON file."""
    values = json.loads(file.read_text())
    what = mutate_values(values, rng) if isinstance(values, dict) and rng.random() < 0.93 else None
    if what is None:
        raw = rng.choice([*RAW, json.dumps(rng.choice(VALUES))])
        file.write_text(raw, encoding="utf-8")
        return f"all of it is {raw[:40]!r}"
    text = json.dumps(values)
    for raw in RAW:
        text = text.replace(json.dumps(_MARK + str(RAW.index(raw))), raw)
    file.write_text(text, encoding="utf-8")
    return what


def mutate_values(values: dict, rng: random.Random) -> str:
    """Change a table somewhere."""
    place, path = values, []
    while True:
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inner or rng.random() < 0.5:
            break
        key = rng.choice(inner)
        place, path = place[key], [*path, key]
    keys = list(place)
    kind = rng.choice(["set", "set", "set", "set", "drop", "rename", "add", "item"])
    key = rng.choice(keys) if keys else "new"
    value = _MARK + str(rng.randrange(len(RAW))) if rng.random() < 0.2 else rng.choice(VALUES)
    if kind == "drop":
        place.pop(key, None)
    elif kind == "rename":
        place[rng.choice(KEYS)] = place.pop(key, None)
    elif kind == "add":
        key = rng.choice(KEYS)
        place[key] = value
    elif kind == "item" and isinstance(place.get(key), list) and place[key]:
        place[key][rng.randrange(len(place[key]))] = value
    else:
        place[key] = value
    return f"{kind} {'.'.join([*path, key])[:60]!r} = {value if not isinstance(value, str) else value[:40]!r}"[:200]


def mutate_tensors(file: Path, rng: random.Random) -> str:
    """Change a file of tensors, which stays a whole one."""
    if rng.random() < 0.15:
        return _mutate_header(file, rng)
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    value = tensors[key]
    kind = rng.choice(["value", "value", "nan", "dtype", "drop", "rename", "add", "swap", *["shape"] * 3])
    if kind == "value":
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] += 1 if value.is_floating_point() else 0
        tensors[key] = value
    elif kind == "nan" and value.is_floating_point():
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf")])
        tensors[key] = value
    elif kind == "dtype":
        tensors[key] = value.to(rng.choice(DTYPES))
    elif kind == "drop":
        del tensors[key]
    elif kind == "rename":
        tensors[rng.choice([f"{key}.x", "x", "", key.upper(), key.replace("layers.0", "layers.7")])] = tensors.pop(key)
    elif kind == "add":
        tensors[rng.choice(["x", f"{key}.x", "base_model.model.lm_head.weight", "inner.7.weight"])] = torch.zeros(3)
    elif kind == "swap":
        other = rng.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other], value
    else:
        tensors[key] = _reshaped(value, rng)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return f"{kind} {key[-60:]}"


def _reshaped(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    shapes = [
        lambda: value.T if value.dim() == 2 else value[None],
        value.flatten,
        lambda: value[:0],
        lambda: value.flatten()[0],
        lambda: torch.cat([value, value]),
        lambda: value[: max(1, len(value) - 1)],
        lambda: value[..., None],
    ]
    return rng.choice(shapes)().clone() if value.dim() else value.clone()


def _mutate_header(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    what = mutate_values(header, rng)
    try:
        text = json.dumps(header).encode()
    except ValueError:
        text = b"{}"
    length = rng.choice([len(text), len(text), len(text), size, 2**62, 0, len(text) + 8])
    file.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
    return f"header {what}"


def copy(source: Path, target: Path) -> None:
    """A copy of a file or folder."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
