"""What each LoRA layer of a base model sees: the text's tokens in order, some of them, or something else.

Scalings belong to tokens, so this decides what they mean in a layer. It is found out once, when the mixture is made:
the base model reads a made-up text of two rows that differ in one late token, and the LoRA layers' inputs are looked
at. Their shapes tell rows from positions; in a causal model nothing before the changed token may change. Models that do
not read token ids (images, sounds), or that cannot be run yet (weights on the meta device, shards), go by their
layers' places alone; the layers then check each call.
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

# The made-up text. Sizes that differ tell what an axis is: two rows of seven tokens (no number that models pad to), the
# last three of which reach a head that takes logits_to_keep; five target tokens for an encoder-decoder.
_ROWS, _TOKENS, _KEPT, _TARGET_TOKENS = 2, 7, 3, 5
# The token in which the rows differ, counted from the end.
_CHANGED = -2

# transformers' names for a decoder's cross-attention, and for the linear layers in it by the tokens that they see.
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
    """What was found out of a base model.

    Attributes:
        kinds: what its LoRA layers see, in the order of their numbers.
        module_state: names of activations that its modules keep from call to call, outside of any cache object.
    """

    kinds: tuple[Sees, ...]
    module_state: tuple[str, ...] = ()


_PADDED = (Sees.PADDED, Sees.PADDED_TRANSPOSED)


def find_layer_inputs(backbone: Backbone) -> LayerInputs:
    """Find out what the LoRA layers of a base model see.

    Args:
        backbone: of the base model, with its adapters in it, whose experts are off.

    Raises:
        ValueError: the base model gives no last hidden state.
        AdapterError, ConfigError: a layer sees something that scalings have no meaning for.
    """
    base = backbone.base
    layers = {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}
    kinds = _by_place(backbone, layers)
    reading = _read_made_up_text(backbone, layers)
    if reading is None:
        backbone.refuse_other_outputs()
        return LayerInputs(tuple(kinds[path] for path in layers))
    kinds |= {path: kind for path, kind in reading.kinds().items() if kinds[path] is not Sees.SOURCE}
    return LayerInputs(tuple(kinds[path] for path in layers), tuple(reading.module_state))


def _by_place(backbone: Backbone, layers: dict[str, Any]) -> dict[str, Sees]:
    """What layers see as far as their places in the model tell."""
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
                _refuse(path, "makes keys and values of cross-attention, of images or of another model's text")
    return kinds | {path: Sees.KEPT for path, layer in layers.items() if layer is output}


def _layers_of_source(base: Any, layers: dict[str, Any]) -> list[str]:
    """The LoRA layers that make the keys and values of an encoder-decoder's cross-attention.

    Raises:
        ConfigError: it cannot be told which tokens a LoRA layer sees.
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
        f"layer {path!r} is adapted, but {what}, which no token's scalings belong to: leave it out of the adapters' "
        "target_modules (peft's exclude_modules)"
    )


@dataclass(frozen=True)
class _Input:
    """What a layer got in one call.

    Attributes:
        sizes: of all axes but the channels.
        sees: what these sizes say; None where the rows of the batch are no axis of it.
        changes: how far the two rows are apart at each position; None where there are no positions.
    """

    sizes: tuple[int, ...]
    sees: Sees | None
    changes: Tensor | None = None


class _Reading:
    """What was seen while the base model read the made-up text.

    Args:
        backbone: of the base model.
        tokens: how many the text has in a row.
    """

    def __init__(self, backbone: Backbone, tokens: int) -> None:
        self.backbone = backbone
        self.tokens = tokens
        self.inputs: dict[str, list[_Input]] = {}
        self.output: Any = None  # the backbone's
        self.module_state: list[str] = []
        inside = set(backbone.module.modules())
        self._inside = {path for path, module in backbone.base.named_modules() if module in inside}
        exact = backbone.dtype().itemsize >= 4 and not getattr(backbone.base, "is_quantized", False)
        self._rounding = 1e-5 if exact else 1e-2

    def note(self, path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A LoRA layer is called."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()
        base_layer = layer.get_base_layer()
        if isinstance(base_layer, nn.Embedding):
            x = x[..., None]
        elif isinstance(base_layer, nn.Conv2d):
            x = x.movedim(1, -1)
        self.inputs.setdefault(path, []).append(self._input(x.double()))

    def _input(self, x: Tensor) -> _Input:
        """What an input `[*sizes, channel]` is, by its sizes."""
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
        """What `[row, position, ...]` is, by the number of positions."""
        length = sizes[1]
        if length in lengths or length == _KEPT:
            return Sees.TOKENS if length in lengths else Sees.KEPT
        return Sees.PADDED if len(sizes) == 2 and length > self.tokens else Sees.SAMPLE

    def kinds(self) -> dict[str, Sees]:
        """What the layers that were called see, by path.

        Raises:
            ValueError: the base model gives no last hidden state.
            AdapterError: a layer sees something that scalings have no meaning for.
        """
        causal, padded, kinds = self._is_causal(), self._padded_lengths(), {}
        for path, inputs in self.inputs.items():
            found = {self._checked(path, one, len(inputs), causal, padded) for one in inputs}
            if len(found) > 1:
                shapes = [[*one.sizes, "channels"] for one in inputs]
                _refuse(path, f"sees activations of several kinds (of shapes {shapes})")
            kinds[path] = found.pop()
        return kinds

    def _is_causal(self) -> bool:
        """Whether no token's last hidden state depends on a later token; False of an encoder-decoder, unasked."""
        if self.backbone.is_encoder_decoder:
            return False
        hidden = self.backbone.hidden_of(self.output)
        return hidden.shape[:2] == (_ROWS, self.tokens) and self._in_order(_changes(hidden.double()), self.tokens)

    def _padded_lengths(self) -> set[int]:
        """Lengths to which the model fills texts up on the right: there a token's change stands at its position.

        Not in every layer: behind an encoder's attention, all positions change alike.
        """
        found, changed = set(), self.tokens + _CHANGED
        for one in [one for inputs in self.inputs.values() for one in inputs if one.sees in _PADDED]:
            assert one.changes is not None
            if 2 * one.changes.topk(2).values[1] < one.changes[changed]:
                found.add(len(one.changes))
        return found

    def _checked(self, path: str, one: _Input, calls: int, causal: bool, padded: set[int]) -> Sees:
        sizes, sees = one.sizes, one.sees
        shown = (
            f"sees activations of shape {[*sizes, 'channels']} where a text has {_ROWS} rows of {self.tokens} tokens"
        )
        if sees is None:
            _refuse(path, f"{shown}: they are not the text's rows")
        if sees in _PADDED and (one.changes is None or len(one.changes) not in padded):
            _refuse(path, f"{shown}: more positions than tokens")
        if sees is Sees.SAMPLE and calls > 1 and len(sizes) > 1:
            _refuse(path, f"{shown}, in {calls} parts")
        if causal and sees is Sees.SAMPLE and (len(sizes) > 1 or path in self._inside):
            _refuse(path, f"{shown}: a mean over the text would let its tokens see later ones")
        length = _KEPT if sees is Sees.KEPT else self.tokens
        if causal and sees is not Sees.SAMPLE and not self._in_order(one.changes, length):
            _refuse(path, f"{shown}: they are not in the text's order")
        return sees

    def _in_order(self, changes: Tensor | None, length: int) -> bool:
        """Whether nothing changes before the token that was changed, of so many, and something there."""
        assert changes is not None
        changed = length + _CHANGED
        most = self._rounding * changes[changed]
        return bool(changes[changed] > 0 and (changes[:changed] <= most).all())


def _changes(x: Tensor) -> Tensor:
    """How far the second row is from the first at each position, of `[row, position, ...]`."""
    return torch.linalg.vector_norm((x[0] - x[1]).flatten(1), dim=1)


def _read_made_up_text(backbone: Backbone, layers: dict[str, Any]) -> _Reading | None:
    """Let the base model read the made-up text; None where it cannot."""
    base, arguments = backbone.base, _made_up_text(backbone)
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
            _no_trace(base, reading.module_state),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            base(**arguments)
            if reading.output is None and not backbone.is_encoder_decoder:  # OPT's head goes past its backbone
                reading.inputs, read = {}, reading.inputs
                backbone.last_hidden_state(arguments)
                reading.inputs = read
    except Exception:  # whatever a model that needs more than token ids makes of them
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return reading


@contextmanager
def _no_trace(base: nn.Module, state: list[str]) -> Iterator[None]:
    """Tensors that modules keep of a call in this block are forgotten; `state` gets the names of the activations."""

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


def _made_up_text(backbone: Backbone) -> dict[str, Any] | None:
    """The arguments of a call that reads the made-up text; None for models that read something else."""
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
        # BigBird gives its sparse attention up, for good, when it reads a text that is shorter.
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
    """Ids in a model's config, some of which stand for images and sounds."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
