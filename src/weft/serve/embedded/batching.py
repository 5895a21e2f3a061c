"""Several texts in one call: transformers' continuous batching, for mixtures of one pass (`gate_layer`).

Its manager reads, caches and schedules; which token comes next is each text's own to say, as where it is read alone.
What its tokens have to do with the experts is asked for in a hook on the base model.
"""

from __future__ import annotations

import copy
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LogitsProcessorList

from weft.base_model.devices import execution_device
from weft.generation.reader import tuner_of
from weft.generation.stream import stream
from weft.serve.embedded.bodies import Prompt, Wanted
from weft.serve.embedded.generating import Writing
from weft.serve.embedded.metrics import Metrics
from weft.serve.embedded.tickets import Delivered, Task, Ticket
from weft.serve.requests import Choice

_PAGE = 32  # tokens
_MOST_TOKENS = 32_768  # in the cache, of all texts together
_MOST_BYTES = 2**30  # of the cache
_MOST_TEXTS = 32  # in a call
_CHUNK = 512  # tokens of prompts in a call
# Two texts that are written in both ways when the engine starts.
_TRIAL = ([1, 2, 3, 4, 5], [3, 2, 1])
_TRIAL_TOKENS = 4
_TRIAL_SECONDS = 300
_FAILED = "transformers' continuous batching has stopped: send the request again"


class Batch:
    """Texts that are written together.

    Args:
        model: a mixture of one pass.
        tokens: for how many the cache has room.
        hand_over: takes a text that has become too long.

    Attributes:
        most: tokens that a text may have here.
    """

    def __init__(self, model: Any, tokens: int, hand_over: Callable[[Task], None]) -> None:
        self.most = tokens // 2  # the manager fails where one text fills its cache
        self._model, self._blocks, self._hand_over = model, tokens // _PAGE, hand_over
        self._passes = tuner_of(model).passes
        self._names = tuner_of(model).xlora_config.expert_names or []
        # The manager is told by a token that a text ends, for whatever reason: where it cancels texts, it may forget
        # to go on with those that wait. A text that really has this token begins anew in the batch, as it stands.
        self._end = len(tuner_of(model).backbone.base.get_input_embeddings().weight) - 1
        self._tasks: dict[int, Task] = {}  # of the manager
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopped: BaseException | None = None
        self._shares: list[list[float]] = []
        self._hook = tuner_of(model).backbone.base.register_forward_hook(self._note_shares, with_kwargs=True)
        self._manager: Any = None

    @classmethod
    def where_exact(cls, model: Any, tokenizer: Any, hand_over: Callable[[Task], None]) -> Batch | None:
        """Such a batch, if the mixture has one pass and a trial gives the tokens of texts that are read alone.

        Args:
            model: a mixture.
            tokenizer: the base model's.
            hand_over: as above.
        """
        tuner = tuner_of(model)
        base = tuner.backbone.base
        manager = getattr(transformers, "ContinuousBatchingManager", None)  # older ones let nobody in between
        if tuner.xlora_config.gate_layer is None or not hasattr(manager, "pause"):
            return None
        if getattr(base.config, "_attn_implementation", None) != "sdpa":
            return None
        tokens = _tokens_that_fit(base)
        if tokens < 4 * _CHUNK:
            return None
        batch = cls(model, tokens, hand_over)
        try:
            device = execution_device(base)
            if batch._trial(tokenizer, device) == [_alone(model, prompt, device) for prompt in _TRIAL]:
                return batch
        except Exception as err:  # of transformers' manager: other versions, bases that it does not know
            logging.getLogger(__name__).debug("no continuous batching: %s", err)
        except BaseException:  # its thread would outlive an interrupt
            batch.close()
            raise
        batch.close()
        return None

    @property
    def running(self) -> int:
        """How many texts are being written."""
        return len(self._tasks)

    def add(self, task: Task) -> bool:
        """Write a text together with the others; False where it cannot be.

        Args:
            task: of the text.
        """
        alone = task.ticket.wanted.choice.decides or task.writing.wants_every_place
        length = task.writing.ids.shape[1]
        if alone or length >= self.most:
            return False
        with self._lock:
            if self._stopped is not None:
                task.ticket.fail(self._stopped)
                return True
            try:
                self._start()
            except Exception as err:  # of transformers' manager, for whoever waits for it
                task.ticket.fail(err)
                return True
            number = next(self._numbers)
            manager, tasks = self._manager, self._tasks
            tasks[number] = task
        # One token more than is wanted: it is the text that says when it ends.
        most, tokens = task.writing.prompt.max_tokens + 1, task.writing.ids[0].tolist()
        taken = manager.add_request(
            tokens, request_id=str(number), max_new_tokens=most, eos_token_id=self._end, number=number
        )
        if taken is None and tasks.pop(number, None) is not None:
            task.ticket.fail(RuntimeError(_FAILED))
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this block the model is the calling thread's."""
        manager = self._manager
        with ExitStack() as stack:
            if manager is not None and manager.is_running():
                with suppress(RuntimeError):  # it has just ended
                    stack.enter_context(manager.pause())
            else:
                stack.enter_context(self._lock)  # no other is begun meanwhile
            yield

    def stop(self, err: BaseException) -> None:
        """Write nothing more.

        Args:
            err: what is told to whoever waits.
        """
        with self._lock:
            self._stopped = err
        for task in list(self._tasks.values()):
            task.ticket.fail(err)

    def close(self) -> None:
        """End the manager, and give the base model back."""
        self._hook.remove()
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(block=True, hard_stop=True)

    # ------------------------------------------------------------------ the manager

    def _start(self) -> None:
        """Have a manager that runs: one fails as a whole, with all that it reads."""
        if self._manager is not None and self._manager.is_running():
            return
        from transformers import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessorList,
        )

        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self._blocks,
            max_batch_tokens=_CHUNK,
            max_requests_per_batch=_MOST_TEXTS,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        generation = copy.deepcopy(self._model.get_base_model().generation_config)
        generation.do_sample = False
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        manager = self._model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        tasks: dict[int, Task] = {}
        own = _of_texts(partial(self._choose, tasks))
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([own]))
        manager.logit_processor.tensors_required = 1
        manager.start()
        self._manager, self._tasks = manager, tasks
        threading.Thread(target=self._watch, args=(manager, tasks), name="weft serve: batch", daemon=True).start()

    def _watch(self, manager: Any, tasks: dict[int, Task]) -> None:
        """Tell of what the manager fails at: what ends well leaves it before it does."""
        for result in manager:
            task = tasks.pop(int(result.request_id), None)
            if task is not None:
                task.ticket.fail(RuntimeError(result.error))
        for task in list(tasks.values()):
            task.ticket.fail(RuntimeError(_FAILED))
        tasks.clear()

    def _note_shares(self, base: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        followed, places = self._passes.followed(), kwargs.get("logits_indices")
        self._shares = [] if followed is None or places is None else followed[0, places].mean(1).tolist()

    def _choose(self, tasks: dict[int, Task], logits: Tensor, numbers: list[int]) -> list[int]:
        """The next token of each text, in the manager's thread."""
        return [self._next(tasks, number, logits[row : row + 1], row) for row, number in enumerate(numbers)]

    def _next(self, tasks: dict[int, Task], number: int, logits: Tensor, row: int) -> int:
        """A text's next token, or the one by which the manager leaves it alone."""
        task = tasks.get(number)
        if task is None:
            return self._end
        if not task.over:
            task.take(logits, dict(zip(self._names, self._shares[row], strict=True)))
        token = int(task.writing.ids[0, -1])
        if not task.over and token != self._end and task.writing.ids.shape[1] < self.most:
            return token
        tasks.pop(number, None)
        if not task.over and not self.add(task):
            self._hand_over(task)
        return self._end

    def _trial(self, tokenizer: Any, device: Any) -> list[list[int]]:
        """What is written of the prompts of the trial."""
        delivered: list[queue.SimpleQueue[Delivered]] = [queue.SimpleQueue() for _ in _TRIAL]
        for prompt, of_text in zip(_TRIAL, delivered, strict=True):
            ticket = Ticket(_greedy(prompt), of_text.put)
            self.add(Task(ticket, Writing(ticket.wanted, 0, tokenizer, device), Metrics([])))
        return [_tokens(of_text) for of_text in delivered]


def _tokens(delivered: queue.SimpleQueue[Delivered]) -> list[int]:
    """Those of a text that is being written."""
    found: list[int] = []
    while (one := delivered.get(timeout=_TRIAL_SECONDS)) is not None:
        if isinstance(one, BaseException):
            raise one
        found += [told.token for told in one.tokens]
    return found


def _greedy(prompt: list[int]) -> Wanted:
    """A request for the likeliest tokens, nothing else."""
    return Wanted(
        chat=False,
        model="",
        choice=Choice(),
        prompts=(Prompt(tuple(prompt), "", _TRIAL_TOKENS),),
        n=1,
        temperature=0.0,
        top_k=None,
        top_p=None,
        repetition_penalty=1.0,
        seed=None,
        stop=(),
        ends=frozenset(),
        logprobs=None,
        echo=False,
        stream=False,
        usage=False,
        token_ids=False,
    )


def _alone(model: Any, prompt: list[int], device: Any) -> list[int]:
    """The same from a text that is read alone."""
    ids = torch.tensor([prompt], device=device)
    steps = stream(model, ids, max_new_tokens=_TRIAL_TOKENS, eos_token_id=[], repetition_penalty=1.0)
    return [step.token for step in steps]


def _tokens_that_fit(base: Any) -> int:
    """For how many tokens the cache has room."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_each = 2 * config.num_hidden_layers * heads * size * base.dtype.itemsize
    return min(_MOST_TOKENS, _MOST_BYTES // bytes_each) // _PAGE * _PAGE


def _of_texts(choose: Callable[[Tensor, list[int]], list[int]]) -> Any:
    """What the manager asks for the next tokens: the texts themselves, which leave nothing else to be chosen."""
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class OfTexts(ContinuousBatchingLogitsProcessor):
        supported_kwargs: dict[str, type] = {"number": int}
        ignored_kwargs = ()

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
            numbers = [request.state.logit_processor_kwargs["number"] for request in requests_with_new_token]
            return torch.tensor(numbers, dtype=torch.int32)

        def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
            chosen = torch.tensor(choose(scores, tensor_arg[: len(scores)].tolist()), device=scores.device)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    return OfTexts()
