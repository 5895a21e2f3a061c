"""Two threads in one model: right one after the other, refused at once; never another text."""

import contextlib
import copy
import threading

import pytest
import torch

import weft
from models import tiny_llama
from weft.errors import ThreadError

PROMPT = torch.tensor([[3, 4, 5, 6]])
MESSAGE = r"the model is being used by another thread \(first\), while second calls it: one thread at a time can use it"


@pytest.fixture
def model(llama_adapters):
    return weft.from_adapters(tiny_llama(), llama_adapters).eval()


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def in_thread(name, function):
    """What a function gives, or raises, in a thread of its own."""
    found = {}

    def run():
        try:
            found["value"] = function()
        except Exception as err:
            found["error"] = err

    thread = threading.Thread(target=run, name=name)
    thread.start()
    return thread, found


def interrupted_by(call, where, other):
    """Let a second thread call while the first one is at `where`, a module of the model; what both get."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread().name == "first" and not reached.is_set():
            reached.set()
            assert go_on.wait(60)

    handle = where.register_forward_pre_hook(wait)
    first, of_first = in_thread("first", call)
    assert reached.wait(60)
    second, of_second = in_thread("second", other)
    second.join(60)
    go_on.set()
    first.join(60)
    handle.remove()
    return of_first, of_second


@pytest.mark.parametrize("where", ["scaling pass", "adapted pass"])
def test_a_call_in_the_midst_of_anothers_is_an_error_and_spoils_neither(model, where):
    expected = model(PROMPT).logits.detach()
    module = model.get_base_model().model.layers[1] if where == "scaling pass" else model.get_base_model().lm_head
    of_first, of_second = interrupted_by(lambda: logits(model), module, lambda: logits(model))
    assert torch.equal(of_first["value"], expected)
    with pytest.raises(ThreadError, match=MESSAGE):
        raise of_second["error"]
    assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("options", [{"gate_layer": 1}, {"scaling_pass_layers": 1}, {}], ids=str)
def test_generations_at_once_give_their_own_text_or_an_error(llama_adapters, options):
    model = weft.from_adapters(tiny_llama(), llama_adapters, **options).eval()
    prompts = [torch.tensor([[7 * number + 1, 7 * number + 2, 7 * number + 3]]) for number in range(4)]
    expected = [model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False) for prompt in prompts]
    threads = [
        in_thread(str(number), lambda p=prompt: model.generate(input_ids=p, max_new_tokens=12, do_sample=False))
        for number, prompt in enumerate(prompts)
    ]
    for (thread, found), right in zip(threads, expected, strict=True):
        thread.join(120)
        if "error" in found:
            assert isinstance(found["error"], ThreadError)
        else:
            assert torch.equal(found["value"], right)
    assert torch.equal(model.generate(input_ids=prompts[0], max_new_tokens=12, do_sample=False), expected[0])


def test_threads_in_turns_are_all_right(model):
    expected = model(PROMPT).logits.detach()
    for _ in range(2):
        thread, found = in_thread("other", lambda: logits(model))
        thread.join(60)
        assert torch.equal(found["value"], expected)


def test_a_block_with_other_scalings_is_its_threads(model):
    with model.fixed_scalings({"math": 1.0}):
        thread, found = in_thread("second", lambda: model(PROMPT))
        thread.join(60)
        assert isinstance(found["error"], ThreadError)
    thread, found = in_thread("second", lambda: model(PROMPT))
    thread.join(60)
    assert "error" not in found


def test_a_thread_that_ended_in_a_call_holds_nothing(model):
    def end(*_):
        raise SystemExit  # no Exception: torch calls no hooks

    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(end)

    def call_and_end():
        with contextlib.suppress(SystemExit):
            model.get_base_model()(PROMPT)

    thread = threading.Thread(target=call_and_end)
    thread.start()
    thread.join(60)
    handle.remove()
    assert model(PROMPT).logits.isfinite().all()


def test_a_copy_is_another_model(model):
    twin = copy.deepcopy(model)
    with model.fixed_scalings({"math": 1.0}):
        thread, found = in_thread("second", lambda: twin(PROMPT))
        thread.join(60)
    assert "error" not in found
