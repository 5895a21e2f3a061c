"""Several texts in one call, with transformers' continuous batching, for mixtures with one pass (`gate_layer`).

transformers' manager runs the model, caches and schedules. The next token is chosen by each text itself, as for texts
that are generated separately. A hook on the base model records the shares of the experts.
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

_PAGE = 32  # tokens in a page of the cache
_MOST_TOKENS = 32_768  # maximum number of tokens in the cache
_MOST_BYTES = 2**30  # maximum size of the cache
_MOST_TEXTS = 32  # maximum number of texts in a call
_CHUNK = 512  # maximum number of prompt tokens in a call
# Two prompts that are continued in both ways when the engine starts, to compare the tokens.
_TRIAL = ([1, 2, 3, 4, 5], [3, 2, 1])
_TRIAL_TOKENS = 4
_TRIAL_SECONDS = 300
_FAILED = "transformers' continuous batching has stopped: send the request again"


class Batch:
    """Texts that are generated together.

    Args:
        model: a mixture with one pass.
        tokens: size of the cache in tokens.
        hand_over: takes a text that has become too long.

    Attributes:
        most: maximum number of tokens of a text.
    """

    def __init__(self, model: Any, tokens: int, hand_over: Callable[[Task], None]) -> None:
        self.most = tokens // 2  # the manager fails if one text fills the cache
        self._model, self._blocks, self._hand_over = model, tokens // _PAGE, hand_over
        self._passes = tuner_of(model).passes
        self._names = tuner_of(model).xlora_config.expert_names or []
        # Each text is ended for the manager by this token, as after a cancellation the manager may not continue with
        # waiting texts. A text that really has this token is added to the batch again with all its tokens.
        self._end = len(tuner_of(model).backbone.base.get_input_embeddings().weight) - 1
        self._tasks: dict[int, Task] = {}  # the texts in the manager
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopped: BaseException | None = None
        self._shares: list[list[float]] = []
        self._hook = tuner_of(model).backbone.base.register_forward_hook(self._note_shares, with_kwargs=True)
        self._manager: Any = None

    @classmethod
    def where_exact(cls, model: Any, tokenizer: Any, hand_over: Callable[[Task], None]) -> Batch | None:
        """A batch if the mixture has one pass and a trial gives the same tokens as separate generation; else None.

        Args:
            model: a mixture.
            tokenizer: the base model's tokenizer.
            hand_over: see the class.
        """
        tuner = tuner_of(model)
        base = tuner.backbone.base
        manager = getattr(transformers, "ContinuousBatchingManager", None)  # older versions cannot pause
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
        except Exception as err:  # transformers' manager: other versions, base models that it does not support
            logging.getLogger(__name__).debug("no continuous batching: %s", err)
        except BaseException:  # the manager's thread would go on after an interrupt
            batch.close()
            raise
        batch.close()
        return None

    @property
    def running(self) -> int:
        """The number of texts in the batch."""
        return len(self._tasks)

    def add(self, task: Task) -> bool:
        """Add a text to the batch; False if it must be generated separately.

        Args:
            task: the text.
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
            except Exception as err:  # an error of transformers' manager goes to the client
                task.ticket.fail(err)
                return True
            number = next(self._numbers)
            manager, tasks = self._manager, self._tasks
            tasks[number] = task
        # One token more than requested, as the text itself decides when it ends.
        most, tokens = task.writing.prompt.max_tokens + 1, task.writing.ids[0].tolist()
        taken = manager.add_request(
            tokens, request_id=str(number), max_new_tokens=most, eos_token_id=self._end, number=number
        )
        if taken is None and tasks.pop(number, None) is not None:
            task.ticket.fail(RuntimeError(_FAILED))
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this block only the calling thread uses the model."""
        manager = self._manager
        with ExitStack() as stack:
            if manager is not None and manager.is_running():
                with suppress(RuntimeError):  # the manager has ended in the meantime
                    stack.enter_context(manager.pause())
            else:
                stack.enter_context(self._lock)  # so that no manager is started
            yield

    def stop(self, err: BaseException) -> None:
        """End all texts with an error, and accept no more.

        Args:
            err: the error.
        """
        with self._lock:
            self._stopped = err
        for task in list(self._tasks.values()):
            task.ticket.fail(err)

    def close(self) -> None:
        """Stop the manager, and remove the hook from the base model."""
        self._hook.remove()
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(block=True, hard_stop=True)

    # ------------------------------------------------------------------ the manager

    def _start(self) -> None:
        """Start a manager if none is running. After an error a manager stops, with all its texts."""
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
        """Pass on the manager's errors. Texts that end normally are removed from `tasks` before."""
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
        """The next token of each text; called in the manager's thread."""
        return [self._next(tasks, number, logits[row : row + 1], row) for row, number in enumerate(numbers)]

    def _next(self, tasks: dict[int, Task], number: int, logits: Tensor, row: int) -> int:
        """A text's next token, or the token with which the manager ends it."""
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
        """The new tokens of the trial's prompts, from the batch."""
        delivered: list[queue.SimpleQueue[Delivered]] = [queue.SimpleQueue() for _ in _TRIAL]
        for prompt, of_text in zip(_TRIAL, delivered, strict=True):
            ticket = Ticket(_greedy(prompt), of_text.put)
            self.add(Task(ticket, Writing(ticket.wanted, 0, tokenizer, device), Metrics([])))
        return [_tokens(of_text) for of_text in delivered]


def _tokens(delivered: queue.SimpleQueue[Delivered]) -> list[int]:
    """Wait for the end of a text, and return its tokens."""
    found: list[int] = []
    while (one := delivered.get(timeout=_TRIAL_SECONDS)) is not None:
        if isinstance(one, BaseException):
            raise one
        found += [info.token for info in one.tokens]
    return found


def _greedy(prompt: list[int]) -> Wanted:
    """A request for greedy decoding."""
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
    """The new tokens of a prompt, generated separately."""
    ids = torch.tensor([prompt], device=device)
    steps = stream(model, ids, max_new_tokens=_TRIAL_TOKENS, eos_token_id=[], repetition_penalty=1.0)
    return [step.token for step in steps]


def _tokens_that_fit(base: Any) -> int:
    """The size of the cache in tokens."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_each = 2 * config.num_hidden_layers * heads * size * base.dtype.itemsize
    return min(_MOST_TOKENS, _MOST_BYTES // bytes_each) // _PAGE * _PAGE


def _of_texts(choose: Callable[[Tensor, list[int]], list[int]]) -> Any:
    """A logits processor of the manager that lets `choose` decide: all other tokens get -inf."""
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
