"""The scaling pass of a frozen base model, computed once for each text and kept on disk.

At `scaling_pass_value` 0 the gate's input depends only on the base model and the tokens. So it is the same in every
epoch, and for every mixture on that base model. `ScalingCache` computes it and keeps it in safetensors files, of which
only the needed rows are read. `ScalingCacheCollator` adds it to batches, and the model uses it instead of a scaling
pass.

The name of a cache's folder is a digest of everything on which the cache depends. The folder gets this name when it is
complete, so an incomplete cache is never used. Its index has the digests of its files, so damage is detected.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.base_model.state import in_evaluation_mode
from weft.data.padded import padded
from weft.errors import CheckpointError, ConfigError, first_line
from weft.files.digests import digest_of_file
from weft.files.failures import errors_of_writing
from weft.files.writing import make_folder
from weft.passes.precomputed import SCALING_PASS_HIDDEN, precomputed_problems
from weft.screen.countdown import Countdown
from weft.train.scaling_index import DTYPES, INDEX, damage_of, digest_of_index, read_index

_VERSION = 1
_TENSOR = "hidden"
# Size of one file, which is in memory while it is written.
_FILE_BYTES = 2**28
# Parts of the names of attributes that make a base model random in training mode.
_RANDOM_IN_TRAINING = ("drop", "jitter")
# Entries of the base model's config that do not change its output.
_NO_INFLUENCE = {"_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype"}

Tokens = Sequence[Sequence[int]]


class ScalingCache:
    """The gate's input `[seq, hidden]` for each of many token sequences. Use `build` to make a cache.

    Args:
        folder: the folder of a complete cache.
        sequences: the token sequences of the cache, in the same order.

    Example:
        >>> cache = weft.ScalingCache.build(model, sequences, "scaling-cache", dtype="bfloat16")
        >>> collator = weft.ScalingCacheCollator(cache, DataCollatorForSeq2Seq(tokenizer))
        >>> Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    """

    def __init__(self, folder: Path, sequences: Tokens) -> None:
        index = read_index(folder)
        self.folder = folder
        self.dtype: torch.dtype = getattr(torch, index["dtype"])
        self.hidden_size: int = index["hidden_size"]
        self._files: list[dict[str, Any]] = index["files"]
        self._first = [file["first"] for file in self._files]
        self._starts = [0, *itertools.accumulate(len(sequence) for sequence in sequences)]
        self._indices = {_digest_of_tokens(sequence): index for index, sequence in enumerate(sequences)}
        self._open: dict[int, Any] = {}

    @classmethod
    def build(
        cls,
        model: Any,
        sequences: Tokens,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        batch_size: int = 8,
        announce: Callable[[str], None] = print,
    ) -> ScalingCache:
        """Return the cache for these sequences; compute it if the folder does not have it.

        The scaling pass runs in evaluation mode, with the caller's autocast. With several processes, the first one must
        build the cache before the others (`TrainingArguments.main_process_first`).

        Args:
            model: a mixture from `weft.from_adapters` or `weft.from_pretrained`, on the device where it will run.
            sequences: token ids of each text as in the batches, without padding.
            folder: folder of caches, each in a subfolder; unused ones can be deleted.
            dtype: dtype of the stored hidden states: "float32", "bfloat16" or "float16".
            batch_size: sequences per forward pass.
            announce: called with a line about the size of the cache before it is computed.

        Raises:
            ConfigError: this model's scaling pass cannot be precomputed, the dtype is unknown or its range is too
                small, or there is not enough free disk space.
            CheckpointError: the folder cannot be written.
        """
        passes = model.passes
        problems = cache_problems(model)
        if dtype not in DTYPES:
            problems.append(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
        if problems:
            raise ConfigError("the scaling pass cannot be cached:", problems)
        key = cache_key(model, sequences, dtype)
        target = Path(folder) / key
        tokens, width = sum(len(sequence) for sequence in sequences), passes.config.hidden_size
        size = tokens * width * getattr(torch, dtype).itemsize
        what = f"scaling pass: {tokens:,} tokens x {width} x {dtype} = {_in_words(size)} in {target}"
        damage = damage_of(target)
        if damage is None:
            announce(f"{what}, found")
        else:
            announce(f"{what}; computed anew: {damage}" if damage else what)
            with errors_of_writing(target.parent, "no text was read yet", "choose another folder"):
                target.parent.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(target.parent).free
            if free < size:
                raise ConfigError(
                    f"the cache of the scaling pass takes {_in_words(size)}, but {folder} has {_in_words(free)} free: "
                    "choose another folder, or a smaller dtype"
                )
            fill = partial(_compute, passes, sequences, dtype=getattr(torch, dtype), batch_size=batch_size)
            make_folder(target, fill)
        return cls(target, sequences)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Float[Tensor, "seq hidden"]:
        """The gate's input for one sequence, read from disk.

        Raises:
            CheckpointError: the file was lost or damaged since the cache was made or found.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._first, index) - 1
        path = self.folder / self._files[file]["name"]
        offset = self._starts[self._first[file]]
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, framework="pt")
            rows = self._open[file].get_slice(_TENSOR)
            return rows[self._starts[index] - offset : self._starts[index + 1] - offset]
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"{path} (scaling pass) cannot be read: {first_line(err)}; start again, and it is computed anew"
            ) from err

    def find(self, tokens: Sequence[int]) -> Float[Tensor, "seq hidden"] | None:
        """The gate's input for these tokens; None if the cache does not have them."""
        index = self._indices.get(_digest_of_tokens(tokens))
        return None if index is None else self[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process must open the files itself


class ScalingCacheCollator:
    """Adds the cached scaling pass of a batch's texts to the batch, as `scaling_pass_hidden` `[batch, seq, hidden]`.

    Texts are looked up by their tokens: the unmasked ones of a row; without an attention mask the whole row, split
    where `position_ids` is 0 (packed texts). If the cache lacks a text, for example of evaluation data, the batch is
    not changed, and the model runs its scaling pass.

    Args:
        cache: the cache.
        collator: a collator that makes a batch with `input_ids` from a list of examples, padded on the right.
    """

    def __init__(self, cache: ScalingCache, collator: Callable[[list[Any]], Any]) -> None:
        self.cache = cache
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        """Return the batch.

        Raises:
            ConfigError: a text of the cache has padding before it.
        """
        batch = self.collator(examples)
        ids = batch["input_ids"]
        hidden = torch.zeros(*ids.shape, self.cache.hidden_size, dtype=self.cache.dtype)
        for row, (start, end) in _texts(ids, batch.get("attention_mask"), batch.get("position_ids")):
            found = self.cache.find(ids[row, start:end].tolist())
            if found is not None:
                if start > 0 and batch.get("attention_mask") is not None:
                    raise ConfigError(
                        "padding_side ('left') must be 'right' with a cache of the scaling pass: after padding, a "
                        "text's first token is predicted from padding, for which the cache has nothing. Set it on the "
                        "tokenizer"
                    )
                hidden[row, start:end] = found
            elif end - start > 1:  # a single token is padding of packed texts, which is not used
                return batch
        batch[SCALING_PASS_HIDDEN] = hidden
        return batch


def _texts(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Iterator[tuple[int, tuple[int, int]]]:
    """(row, (start, end)) of each text in a batch."""
    for row, tokens in enumerate(ids):
        length = len(tokens)
        if mask is not None:
            present = mask[row].nonzero().flatten().tolist()
            starts, length = ([present[0]], present[-1] + 1) if present else ([], 0)
        elif positions is not None:
            starts = (positions[row] == 0).nonzero().flatten().tolist()
        else:
            starts = [0]
        for start, end in itertools.pairwise([*starts, length]):
            yield row, (start, end)


def cache_problems(model: Any) -> list[str]:
    """One sentence for each reason why this model's scaling pass cannot be computed once for all epochs."""
    passes = model.passes
    problems = precomputed_problems(passes.config, passes.backbone)
    base = passes.backbone.module
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad and not _is_lora(name)]
    if trainable:
        problems.append(
            f"the base model must be frozen, but {trainable[0]} is trainable ({len(trainable)} parameters are): call "
            "requires_grad_(False) on them"
        )
    random = list(_random_in_training(base))
    if random:
        problems.append(
            f"{random[0][0]} ({random[0][1]}) must be 0: in training mode the base model drops or disturbs "
            "activations, so that no two scaling passes are alike, and the cache is of evaluation mode. Set the "
            "base model's dropout to 0 in its config"
        )
    meta = next((name for name, parameter in base.named_parameters() if parameter.is_meta), None)
    if meta is not None:
        problems.append(f"{meta} is offloaded (on the device meta), where its digest cannot be taken: load it whole")
    return problems


def _random_in_training(base: nn.Module) -> Iterator[tuple[str, float]]:
    """(name, value) of each attribute that makes the base model random in training mode."""
    for path, module in base.named_modules():
        if _is_lora(path):
            continue  # the experts are off in the scaling pass
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                yield f"{path}.p", module.p
            continue
        for name, value in vars(module).items():
            if isinstance(value, float) and value > 0 and any(part in name for part in _RANDOM_IN_TRAINING):
                yield f"{path}.{name}", value


def cache_key(model: Any, sequences: Tokens, dtype: str) -> str:
    """A digest (SHA-256) of everything on which a cache depends.

    This is: the base model's weights, buffers and config, the gate's own LoRA in the scaling pass, the tokens,
    `scaling_pass_layers`, the dtype, autocast and the version of transformers. Adapters, the rest of the gate and
    training options are not included and may change.
    """
    passes = model.passes
    base = passes.backbone.module
    config = passes.backbone.base.config
    kind = next(base.parameters()).device.type
    setting = {
        "version": _VERSION,
        "transformers": transformers.__version__,
        "model": type(base).__name__,
        "config": {name: value for name, value in config.to_dict().items() if name not in _NO_INFLUENCE},
        "attention": config._attn_implementation,
        "scaling_pass_layers": passes.config.scaling_pass_layers,
        "dtype": dtype,
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
    }
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True, default=str).encode())
    for name, value in _base_tensors(base):
        _add_tensor(digest, name, value)
    if passes.config.scaling_pass_rank is not None:
        for name, value in passes.gate.scaling_pass_lora.state_dict().items():
            _add_tensor(digest, f"scaling_pass_lora.{name}", value)
    for sequence in sequences:
        digest.update(_digest_of_tokens(sequence))
    return digest.hexdigest()[:32]


def _base_tensors(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """The tensors of the base model, with their names in a model without adapters."""
    for path, module in base.named_modules():
        if not _is_lora(path):
            saved: dict[str, Any] = {}
            module._save_to_state_dict(saved, "", False)  # without submodules; quantised modules add their scales
            saved |= dict(module.named_buffers(recurse=False))  # also non-persistent buffers
            plain = path.replace(".base_layer", "")
            yield from ((f"{plain}.{name}", value) for name, value in sorted(saved.items()))


def _add_tensor(digest: Any, name: str, value: Any) -> None:
    if hasattr(value, "__tensor_flatten__"):  # a tensor subclass, for example of torchao
        parts, context = value.__tensor_flatten__()
        digest.update(f"{name} {context}".encode())
        for part in parts:
            _add_tensor(digest, f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    else:
        digest.update(f"{name} {value}".encode())


def _is_lora(path: str) -> bool:
    return any(part.startswith("lora_") for part in path.split("."))


def _digest_of_tokens(tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(array("q", tokens).tobytes()).digest()[:16]


def _compute(passes: Any, sequences: Tokens, target: Path, dtype: torch.dtype, batch_size: int) -> None:
    """Write the files of a cache, then their index."""
    files: list[dict[str, Any]] = []
    width = passes.config.hidden_size
    with in_evaluation_mode(passes.backbone.base), Countdown(len(sequences), "scaling pass") as countdown:
        for first, part in _in_files(sequences, width * dtype.itemsize):
            name = f"{len(files):05d}.safetensors"
            hidden = _hidden_states(passes, part, dtype, batch_size, countdown.advance)
            save_file({_TENSOR: hidden}, target / name)
            files.append({"name": name, "first": first, **digest_of_file(target / name)})
    index: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "hidden_size": width, "files": files}
    index["index"] = digest_of_index(index)
    (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _in_files(sequences: Tokens, bytes_per_token: int) -> Iterator[tuple[int, Tokens]]:
    """Yield (index of the first sequence, sequences) for each file."""
    first = size = 0
    for index, sequence in enumerate(sequences):
        if size >= _FILE_BYTES:
            yield first, sequences[first:index]
            first, size = index, 0
        size += len(sequence) * bytes_per_token
    yield first, sequences[first:]


def _hidden_states(
    passes: Any, sequences: Tokens, dtype: torch.dtype, batch_size: int, advance: Callable[[int], None]
) -> Float[Tensor, "tokens hidden"]:
    """The gate's input for all sequences, concatenated."""
    device = next(passes.backbone.module.parameters()).device
    starts = [0, *itertools.accumulate(len(sequence) for sequence in sequences)]
    hidden = torch.empty(starts[-1], passes.config.hidden_size, dtype=dtype)
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))  # to reduce padding
    for start in range(0, len(sequences), batch_size):
        indices = by_length[start : start + batch_size]
        ids, mask = padded([sequences[index] for index in indices])
        found = passes.scaling_pass_alone({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
        kept = found.to("cpu", dtype)
        if dtype == torch.float16 and not torch.equal(kept.isfinite(), found.isfinite().cpu()):
            raise ConfigError(
                f"dtype ('float16') cannot hold the base model's hidden states (up to {float(found.abs().max()):.3g}, "
                "float16 ends at 65504): take bfloat16 or float32"
            )
        for index, row in zip(indices, kept, strict=True):
            hidden[starts[index] : starts[index + 1]] = row[: len(sequences[index])]
        advance(len(indices))
    return hidden


def _in_words(size: int) -> str:
    if size < 1000:
        return f"{size} bytes"
    power = min(3, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:,.1f} {('kB', 'MB', 'GB')[power - 1]}"
