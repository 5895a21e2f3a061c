"""Finds the kind of input of each LoRA layer: all tokens in order, some of them, or other data (`Sees`).

Scalings belong to tokens, so this decides how they apply in a layer. It is found once, when the mixture is made: the
base model runs a probe text of two rows that differ in one late token, and the inputs of the LoRA layers are recorded.
Their shapes show which axis is the batch and which the sequence. In a causal model, nothing before the changed token
may change. Some models cannot be run: those that do not read token ids (images, sounds), or whose weights are on the
meta device or sharded. There the layers' names decide, and the layers check the shapes in each call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.base_model.backbone import Backbone
from weft.base_model.devices import execution_device
from weft.base_model.state import in_evaluation_mode
from weft.errors import AdapterError, ConfigError
from weft.gate.routing import Sees

# The probe text. All sizes differ, so that they identify the axes: two rows of seven tokens (to which no model pads),
# of which the last three are kept by logits_to_keep; five target tokens for an encoder-decoder.
_ROWS, _TOKENS, _KEPT, _TARGET_TOKENS = 2, 7, 3, 5
# Index of the token in which the rows differ.
_CHANGED = -2

# transformers' names for cross-attention, and for its linear layers whose input is source or target tokens.
_CROSS_ATTENTION = {
    "EncDecAttention",
    "encoder_attn",
    "cross_attn",
    "cross_attention",
    "crossattention",
    "encoder_decoder_attention",
}
_SEE_SOURCE = {"k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "c_attn"}
_SEE_TARGET = {"q", "o", "q_proj", "o_proj", "out_proj", "query", "query_proj", "output", "dense", "q_attn", "c_proj"}


@dataclass(frozen=True)
class LayerInputs:
    """The result for a base model.

    Attributes:
        kinds: kind of input of each LoRA layer, in the order of their numbers.
        module_state: names of activations that modules keep between calls, outside of any cache object.
    """

    kinds: tuple[Sees, ...]
    module_state: tuple[str, ...] = ()


_PADDED = (Sees.PADDED, Sees.PADDED_TRANSPOSED)


def find_layer_inputs(backbone: Backbone) -> LayerInputs:
    """Find the kind of input of each LoRA layer of a base model.

    Args:
        backbone: the backbone of the base model, with its adapters in it and the experts off.

    Raises:
        ValueError: the base model has no last hidden state in its output.
        AdapterError, ConfigError: scalings of tokens cannot be applied to the input of a layer.
    """
    base = backbone.base
    layers = {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}
    kinds = _kinds_by_path(backbone, layers)
    reading = _run_probe(backbone, layers)
    if reading is None:
        backbone.refuse_other_outputs()
        return LayerInputs(tuple(kinds[path] for path in layers))
    kinds |= {path: kind for path, kind in reading.kinds().items() if kinds[path] is not Sees.SOURCE}
    return LayerInputs(tuple(kinds[path] for path in layers), tuple(reading.module_state))


def _kinds_by_path(backbone: Backbone, layers: dict[str, Any]) -> dict[str, Sees]:
    """The kind of input of each layer, by its path in the model."""
    base: Any = backbone.base
    output = base.get_output_embeddings()
    if backbone.is_encoder_decoder:
        source, encoder = _layers_of_source(base, layers), set(base.get_encoder().modules())
        kinds = {path: Sees.SAMPLE if layer in encoder else Sees.TOKENS for path, layer in layers.items()}
        kinds |= dict.fromkeys(source, Sees.SOURCE)
    else:
        reads_text = base.can_generate() or base.main_input_name == "input_ids"
        kinds = dict.fromkeys(layers, Sees.TOKENS if reads_text else Sees.SAMPLE)
        for path in layers:
            *parents, name = path.split(".")
            if base.can_generate() and name in _SEE_SOURCE and _CROSS_ATTENTION.intersection(parents):
                _refuse(path, "it computes keys and values of cross-attention, from images or another model's text")
    return kinds | {path: Sees.KEPT for path, layer in layers.items() if layer is output}


def _layers_of_source(base: Any, layers: dict[str, Any]) -> list[str]:
    """The LoRA layers that compute the keys and values of an encoder-decoder's cross-attention.

    Raises:
        ConfigError: it is not known whether a LoRA layer's input is source or target tokens.
    """
    encoder, decoder = base.get_encoder(), base.get_decoder()
    if not any(_CROSS_ATTENTION.intersection(path.split(".")) for path, _ in decoder.named_modules()):
        raise ConfigError(
            f"the base model ({type(base).__name__}) has no cross-attention in its decoder under a name that weft "
            f"knows, so that it cannot tell which layers see source tokens: expected one of {sorted(_CROSS_ATTENTION)}"
        )
    placed = {*encoder.modules(), *decoder.modules(), base.get_input_embeddings(), base.get_output_embeddings()}
    found = []
    for path, module in layers.items():
        *parents, name = path.split(".")
        in_cross_attention = bool(_CROSS_ATTENTION.intersection(parents))
        if module not in placed or (in_cross_attention and name not in _SEE_SOURCE | _SEE_TARGET):
            raise ConfigError(
                f"layer {path!r} is adapted, of which weft cannot tell whether it sees source or target tokens: "
                "expected layers of the encoder, of the decoder (in its cross-attention one of "
                f"{sorted(_SEE_SOURCE | _SEE_TARGET)}) or the LM head"
            )
        if in_cross_attention and name in _SEE_SOURCE:
            found.append(path)
    return found


def _refuse(path: str, what: str) -> NoReturn:
    raise AdapterError(
        f"layer {path!r} is adapted, but scalings of tokens cannot be applied to it, as {what}: leave it out of the "
        "adapters' target_modules (peft's exclude_modules)"
    )


@dataclass(frozen=True)
class _Input:
    """The input of a layer in one call.

    Attributes:
        sizes: sizes of all axes except the channels.
        sees: the kind of input, from the sizes; None if no axis is the batch.
        changes: distance of the two rows at each position; None if there are no positions.
    """

    sizes: tuple[int, ...]
    sees: Sees | None
    changes: Tensor | None = None


class _Reading:
    """The inputs of the LoRA layers while the base model ran the probe text.

    Args:
        backbone: the backbone of the base model.
        tokens: number of tokens in a row of the probe text.
    """

    def __init__(self, backbone: Backbone, tokens: int) -> None:
        self.backbone = backbone
        self.tokens = tokens
        self.inputs: dict[str, list[_Input]] = {}
        self.output: Any = None  # of the backbone
        self.module_state: list[str] = []
        inside = set(backbone.module.modules())
        self._inside = {path for path, module in backbone.base.named_modules() if module in inside}
        exact = backbone.dtype().itemsize >= 4 and not getattr(backbone.base, "is_quantized", False)
        self._rounding = 1e-5 if exact else 1e-2

    def note(self, path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call of a LoRA layer."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()
        base_layer = layer.get_base_layer()
        if isinstance(base_layer, nn.Embedding):
            x = x[..., None]
        elif isinstance(base_layer, nn.Conv2d):
            x = x.movedim(1, -1)
        self.inputs.setdefault(path, []).append(self._input(x.double()))

    def _input(self, x: Tensor) -> _Input:
        """Record an input `[*sizes, channel]`, with its kind from the sizes."""
        sizes, tokens = tuple(x.shape[:-1]), self.tokens
        lengths = {tokens, _TARGET_TOKENS} if self.backbone.is_encoder_decoder else {tokens}
        if len(sizes) == 1 and sizes[0] in {_ROWS * length for length in lengths}:
            return _Input(sizes, Sees.TOKENS, _changes(x.view(_ROWS, -1, x.shape[-1])))
        if len(sizes) == 1 or sizes[0] == _ROWS:
            sees = None if sizes[0] != _ROWS else Sees.SAMPLE if len(sizes) == 1 else self._by_length(sizes, lengths)
            return _Input(sizes, sees, _changes(x) if len(sizes) > 1 else None)
        if sizes[1] == _ROWS and sizes[0] >= min(lengths):
            sees = Sees.TRANSPOSED if sizes[0] in lengths else Sees.PADDED_TRANSPOSED
            return _Input(sizes, sees, _changes(x.transpose(0, 1)))
        return _Input(sizes, None)

    def _by_length(self, sizes: tuple[int, ...], lengths: set[int]) -> Sees:
        """The kind of an input `[row, position, ...]`, from the number of positions."""
        length = sizes[1]
        if length in lengths or length == _KEPT:
            return Sees.TOKENS if length in lengths else Sees.KEPT
        return Sees.PADDED if len(sizes) == 2 and length > self.tokens else Sees.SAMPLE

    def kinds(self) -> dict[str, Sees]:
        """path -> kind of input, for the layers that were called.

        Raises:
            ValueError: the base model has no last hidden state in its output.
            AdapterError: scalings of tokens cannot be applied to the input of a layer.
        """
        causal, padded, kinds = self._is_causal(), self._padded_lengths(), {}
        for path, inputs in self.inputs.items():
            found = {self._checked(path, one, len(inputs), causal, padded) for one in inputs}
            if len(found) > 1:
                shapes = [[*one.sizes, "channels"] for one in inputs]
                _refuse(path, f"its inputs are of several kinds (of shapes {shapes})")
            kinds[path] = found.pop()
        return kinds

    def _is_causal(self) -> bool:
        """Whether no token's last hidden state depends on a later token; False for an encoder-decoder."""
        if self.backbone.is_encoder_decoder:
            return False
        hidden = self.backbone.hidden_of(self.output)
        return hidden.shape[:2] == (_ROWS, self.tokens) and self._in_order(_changes(hidden.double()), self.tokens)

    def _padded_lengths(self) -> set[int]:
        """The lengths to which the model pads on the right: there the change is at the position of the changed token.

        One such layer is enough: after an encoder's attention, all positions change.
        """
        found, changed = set(), self.tokens + _CHANGED
        for one in [one for inputs in self.inputs.values() for one in inputs if one.sees in _PADDED]:
            assert one.changes is not None
            if 2 * one.changes.topk(2).values[1] < one.changes[changed]:
                found.add(len(one.changes))
        return found

    def _checked(self, path: str, one: _Input, calls: int, causal: bool, padded: set[int]) -> Sees:
        sizes, sees = one.sizes, one.sees
        shown = f"its input has shape {[*sizes, 'channels']} for a text of {_ROWS} rows of {self.tokens} tokens"
        if sees is None:
            _refuse(path, f"{shown}, without an axis for the rows")
        if sees in _PADDED and (one.changes is None or len(one.changes) not in padded):
            _refuse(path, f"{shown}, with more positions than tokens")
        if sees is Sees.SAMPLE and calls > 1 and len(sizes) > 1:
            _refuse(path, f"{shown}, in {calls} parts")
        if causal and sees is Sees.SAMPLE and (len(sizes) > 1 or path in self._inside):
            _refuse(path, f"{shown}; a mean over the text would let tokens depend on later ones")
        length = _KEPT if sees is Sees.KEPT else self.tokens
        if causal and sees is not Sees.SAMPLE and not self._in_order(one.changes, length):
            _refuse(path, f"{shown}, not in the order of the tokens")
        return sees

    def _in_order(self, changes: Tensor | None, length: int) -> bool:
        """Whether the first change is at the changed token, in a text of this length."""
        assert changes is not None
        changed = length + _CHANGED
        most = self._rounding * changes[changed]
        return bool(changes[changed] > 0 and (changes[:changed] <= most).all())


def _changes(x: Tensor) -> Tensor:
    """The distance of the two rows at each position, for x `[row, position, ...]`."""
    return torch.linalg.vector_norm((x[0] - x[1]).flatten(1), dim=1)


def _run_probe(backbone: Backbone, layers: dict[str, Any]) -> _Reading | None:
    """Run the base model on the probe text; None if it cannot be run."""
    base, arguments = backbone.base, _probe_arguments(backbone)
    absent = any(parameter.is_meta or parameter.numel() == 0 for parameter in base.parameters())
    if arguments is None or absent:
        return None
    reading, hooks = _Reading(backbone, arguments["input_ids"].shape[1]), []

    def watch(path: str, layer: nn.Module) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reading.note(path, module, args, kwargs)

        return layer.register_forward_pre_hook(note, with_kwargs=True)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        reading.output = output

    try:
        hooks += [watch(path, layer) for path, layer in layers.items()]
        hooks.append(backbone.module.register_forward_hook(keep))
        with (
            in_evaluation_mode(base),
            _restoring_module_state(base, reading.module_state),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            base(**arguments)
            if reading.output is None and not backbone.is_encoder_decoder:  # OPT calls its decoder, not its backbone
                reading.inputs, read = {}, reading.inputs
                backbone.last_hidden_state(arguments)
                reading.inputs = read
    except Exception:  # a model that needs more inputs than token ids may raise anything
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return reading


@contextmanager
def _restoring_module_state(base: nn.Module, state: list[str]) -> Iterator[None]:
    """Restore the tensors that modules store during the block; the names of the activations go to `state`."""

    def kept(module: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}

    before = [(path, module, dict(vars(module)), dict(module._buffers)) for path, module in base.named_modules()]
    try:
        yield
    finally:
        for path, module, values, buffers in before:
            for name, value in kept(module).items():
                if name in values and values[name] is value:
                    continue
                if value.is_floating_point():
                    state.append(f"{path}.{name}")
                vars(module).pop(name)
                if name in values:
                    vars(module)[name] = values[name]
            module._buffers.clear()
            module._buffers.update(buffers)


def _probe_arguments(backbone: Backbone) -> dict[str, Any] | None:
    """The arguments of a call with the probe text; None for models that do not read token ids."""
    base = backbone.base
    embeddings = base.get_input_embeddings() if base.main_input_name == "input_ids" else None
    vocabulary = getattr(embeddings, "num_embeddings", None)
    if embeddings is None or not isinstance(vocabulary, int):
        return None
    special = set(_special_tokens(base.config.to_dict()))
    usable = [token for token in range(1, min(vocabulary, 1000)) if token not in special]
    if len(usable) < 2:
        return None
    tokens = _TOKENS
    if getattr(base.config, "num_random_blocks", None):
        # BigBird permanently switches off its sparse attention if a text is shorter.
        tokens += (5 + 2 * base.config.num_random_blocks) * base.config.block_size
    row = [usable[position % (len(usable) - 1)] for position in range(tokens)]
    ids = torch.tensor([row] * _ROWS, device=execution_device(embeddings))
    ids[1, _CHANGED] = usable[-1]
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True}
    if backbone.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids[:, :_TARGET_TOKENS]
    for name, value in {"use_cache": False, "logits_to_keep": _KEPT}.items():
        if backbone.takes(name):
            arguments[name] = value
    return arguments


def _special_tokens(config: dict[Any, Any]) -> Iterator[int]:
    """The token ids in a model's config, some of which are placeholders for images and sounds."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
