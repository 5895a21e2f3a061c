"""Several devices, pretended on the CPU: every tensor knows on which one it would be, and mixing them is an error.

The devices are `cpu:1`, `cpu:2`, ..., which torch takes for the CPU; what is made with no device is on `cpu`. So values
and gradients are real, and what would fail with two GPUs fails here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import weft

HOME = torch.device("cpu")
WEFT = Path(weft.__file__).parent  # folders above may have any name, that of the package too
_MOVES = {Tensor.to, Tensor.cpu}
# They read an index or a value from wherever it is.
_MAY_CROSS = {Tensor.copy_, Tensor.__setitem__}


def whereabouts(tensor):
    """The pretended device of a tensor."""
    return getattr(tensor, "_pretended", HOME)


def _tensors(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


class PretendedDevices(TorchFunctionMode):
    """In this block tensors are on pretended devices.

    Args:
        without_moves_in: path of a file of weft whose moves between devices do nothing, as if they were forgotten.
    """

    def __init__(self, without_moves_in=None):
        super().__init__()
        self.without_moves_in = without_moves_in
        self.moves = set()

    def __enter__(self):
        self._new_parameter = nn.Parameter.__new__
        nn.Parameter.__new__ = self._parameter  # the only maker of tensors that no mode sees
        return super().__enter__()

    def __exit__(self, *error):
        nn.Parameter.__new__ = self._new_parameter
        return super().__exit__(*error)

    def _parameter(self, cls, data=None, requires_grad=True):
        parameter = self._new_parameter(cls, data, requires_grad)
        parameter._pretended = HOME if data is None else whereabouts(data)
        return parameter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:
            return whereabouts(args[0])
        if function == Tensor.data.__set__:
            args[0]._pretended = whereabouts(args[1])
        result = function(*args, **kwargs)
        if not any(True for _ in _tensors([result])):
            return result  # a look at the tensors, not a computation with them
        device = self._device_of_result(function, args, kwargs)
        if function in _MOVES and result is args[0] and device != whereabouts(result):
            result = result.view_as(result)  # a tensor of its own, as a move gives
        for tensor in _tensors([result]):
            tensor._pretended = device
        return result

    def _device_of_result(self, function, args, kwargs):
        if function in _MOVES:
            return self._moved(function, args, kwargs)
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"])
        tensors = list(_tensors([args, kwargs]))
        if function in _MAY_CROSS:
            return whereabouts(args[0])
        if function is Tensor.__getitem__:  # an index may always be on the CPU
            tensors = tensors[:1] + [index for index in tensors[1:] if whereabouts(index) != HOME]
        found = {whereabouts(tensor) for tensor in tensors if tensor.dim() > 0 or whereabouts(tensor) != HOME}
        if len(found) > 1:
            raise RuntimeError(f"expected all tensors on one device, found {sorted(map(str, found))} in {function}")
        return found.pop() if found else HOME

    def _moved(self, function, args, kwargs):
        if function is Tensor.cpu:
            return HOME
        before, wanted = whereabouts(args[0]), kwargs.get("device")
        for value in args[1:]:
            if isinstance(value, Tensor):
                wanted = whereabouts(value)
            elif isinstance(value, (str, torch.device)):
                wanted = value
        wanted = before if wanted is None else torch.device(wanted)
        file = _file_of_weft()
        if file is not None and wanted != before:
            self.moves.add(file)
        return before if file is not None and file == self.without_moves_in else wanted


def _file_of_weft():
    """The file of weft that called torch just now, if any, as "layers/base.py"."""
    path = Path(sys._getframe(4).f_code.co_filename)
    return path.relative_to(WEFT).as_posix() if path.is_relative_to(WEFT) else None


class _Placed(AlignDevicesHook):
    """accelerate's hook of a part of a model, with the part on a pretended device."""

    def init_hook(self, module):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                    moved._pretended = torch.device(self.execution_device)
                    part._parameters[name] = moved
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(self.execution_device)
        return module


class _Start(AlignDevicesHook):
    """accelerate's hook of a whole model: the call goes to its first device, the output back to where it came from."""

    def init_hook(self, module):
        return module


def dispatch(model, device_map):
    """Put the parts of a model on pretended devices, as accelerate's `dispatch_model` does with real ones."""
    for name, device in device_map.items():
        add_hook_to_module(model.get_submodule(name), _Placed(device, skip_keys=["past_key_values"]))
    first = next(iter(device_map.values()))
    add_hook_to_module(model, _Start(first, io_same_device=True, skip_keys=["past_key_values"]))
    model.hf_device_map = device_map
    return model
