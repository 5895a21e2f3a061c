"""Ctrl-C ends a training after the step, whenever it comes."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from weft.train import stopping
from weft.train.stopping import StopOnInterrupt


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_interrupt_is_not_lost_while_the_processes_ask_each_other(when, monkeypatch):
    def asked(flag, device):
        if when == "during":
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.undo()
        return flag

    callback, args = StopOnInterrupt(), SimpleNamespace(device=torch.device("cpu"))
    before = signal.getsignal(signal.SIGINT)
    callback.on_train_begin(args, None, None)
    try:
        if when == "before":
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(stopping, "any_process", asked)
        controls = [SimpleNamespace(should_save=False, should_training_stop=False) for _ in range(2)]
        for control in controls:
            callback.on_step_end(args, None, control)
    finally:
        callback.on_train_end(args, None, None)
    assert [control.should_training_stop for control in controls] == [when == "before", True]
    assert callback.requested
    assert signal.getsignal(signal.SIGINT) == before
