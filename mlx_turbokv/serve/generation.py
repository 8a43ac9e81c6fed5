"""The thread that generates: requests in batches, or one by one where they cannot be batched."""

from __future__ import annotations

import _thread
import gc
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import TextStateMachine

from ..errors import InputError
from . import single
from .batches import Batch
from .errors import RequestError
from .jobs import Answer, Choice, Job
from .models import TurboModelProvider
from .prompt_cache import PromptCache
from .prompts import prompt_of
from .requests import Asked
from .services import Services

END_SECONDS = 10
Admit = Callable[[Job, int, "list[Any] | None"], None]
logger = logging.getLogger(__name__)


class Generator(server.ResponseGenerator):
    """Generates in a thread of its own. When that ends for any reason, the process is told to end.

    An exception while generating fails the requests that it belongs to: the requests of a batch
    that failed go on one by one, each from the tokens that it has.

    Attributes:
        failure: what ended the thread before it was told to stop.
        pages: what else can be asked for, by path: each gives (content type, text).
        services: the prompt cache, the memory budget and the metrics.
        admit: called with a job, the number of its prompt's tokens that are cached, and those
            caches, before anything is computed for it; raises RequestError to refuse it.

    Args:
        provider: loads models.
        prompt_cache: caches of finished requests.
        when_loaded: called once, when the command line's model is served.
    """

    model_provider: TurboModelProvider

    def __init__(
        self,
        provider: TurboModelProvider,
        prompt_cache: PromptCache,
        when_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.failure: BaseException | None = None
        self.services = Services(provider, prompt_cache, self._queue)
        self.admit: Admit = self._admit
        self.pages: dict[str, Callable[[], tuple[str, str]]] = self.services.pages()
        self.answered = self.services.metrics.answered
        self._is_serving_alone = False
        self._is_loaded, self._when_loaded = False, when_loaded
        self._waiting: deque[Job] = deque()
        self._batch: Batch | None = None
        self._vocabularies: dict[Any, frozenset[int]] = {}
        caches: Any = prompt_cache  # stands in for mlx-lm's
        super().__init__(provider, caches)

    def _queue(self) -> tuple[int, int]:
        """How many jobs wait, and how many are generated."""
        running = len(self._batch.jobs) if self._batch is not None else 0
        return self.requests.qsize() + len(self._waiting), running + self._is_serving_alone

    def submit(self, asked: Asked) -> Answer:
        """Start a request: the answer's choices are those of each prompt in turn."""
        answer = Answer()
        n = len(asked.arguments)
        for i, prompt in enumerate(asked.prompts):
            for j, arguments in enumerate(asked.arguments):
                self.requests.put((Choice(answer, i * n + j), prompt, arguments))
        return answer

    def receive(self, answer: Answer, seconds: float) -> tuple[int, Any] | None:
        """The next (choice, item) of an answer; None if there is none for so long.

        Raises:
            RequestError: 503; the thread has ended.
        """
        try:
            return answer.items.get(timeout=seconds)
        except Empty:
            if not self.generation_available():
                raise RequestError(503, "The server is ending.") from None
            return None

    @property
    def status(self) -> str:
        """``ok``, ``loading model`` or ``unavailable``."""
        if not self.generation_available() or self._stop:
            return "unavailable"
        return "ok" if self._is_loaded else "loading model"

    def stop_and_join(self) -> None:
        """Stop, and wait for the end: not for long for a message of a machine that ended first."""
        self._stop = True
        self._generation_thread.join(END_SECONDS if self._is_distributed else None)

    def _run_generate(self) -> None:
        try:
            self._generate()
        except BaseException as error:
            self.failure = error
            self._generation_failed = True
            if not isinstance(error, InputError):
                logger.exception("The generating thread died.")
        finally:
            if not self._stop:
                self._end_process()
            # MLX aborts a process that ends while its streams exist
            mx.clear_streams()

    def _end_process(self) -> None:
        self.failure = self.failure or RuntimeError("The generating thread has ended.")
        _thread.interrupt_main()
        # should the main thread not get there
        timer = threading.Timer(END_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _generate(self) -> None:
        # Batches run in the stream of the messages between machines.
        self.stream = mx.default_stream(mx.default_device())
        self.model_provider.load_default()
        self.services.take_model()
        self._is_loaded = True
        self._when_loaded()
        if self._is_distributed:
            seed: Any = mx.distributed.all_sum(mx.random.state[0])  # type: ignore[index]
            mx.random.seed(seed.view(mx.uint64).item())
        held: Job | None = None
        while not self._stop:
            job = None if held is not None else self._next_job()
            if job is not None and self._batch is not None and not self._joins(job, self._batch):
                held, job = job, None
            if job is not None:
                self._start(job)
            elif self._batch is not None and self._batch.jobs:
                self._run_batch(self._batch)
            elif held is not None:
                self._close_batch()
                job, held = held, None
                self._start(job)
        # the thread that made the arrays also drops them
        self._close_batch()
        self.model_provider.reset()
        self.services.prompt_cache.clear()
        del self.prompt_cache
        gc.collect()

    def _next_job(self) -> Job | None:
        busy = self._batch is not None and self._batch.jobs
        if self._waiting and not busy:
            return self._waiting.popleft()
        found: Any = self._next_request(None if busy else 0.1)
        return None if found is None else Job(*found)

    def _key(self, job: Job) -> Any:
        model = job.args.model
        return self.model_provider.key(model.model, model.adapter, model.draft)

    def _joins(self, job: Job, batch: Batch) -> bool:
        """Whether a job can be started while the batch runs, if only to be refused."""
        if job.alone or batch.alone:
            return False
        try:
            if self._key(job) != batch.key or not self._can_batch(job):
                return False
            self._prepare(job)
            return self.services.budget.joins(job, list(batch.jobs.values()))
        except Exception:
            return True  # its start fails likewise

    def _can_batch(self, job: Job) -> bool:
        images = any(server._image_parts(job.request.messages))
        return self.model_provider.is_batchable and job.args.seed is None and not images

    def _start(self, job: Job) -> None:
        """Load the job's model and put it in the batch, or serve it alone."""
        if job.cancelled and not self._is_distributed:
            return
        try:
            model = job.args.model
            self.model_provider.load(model.model, model.adapter, model.draft)
            self.services.take_asked_model()
            self._prepare(job)
            if not self._can_batch(job):
                self._is_serving_alone = True
                single.serve(self, job)
                return
            if self._batch is None:
                self._batch = Batch(self, job.alone)
            self._batch.add(job)
        except single.CancelledError:
            pass
        except Exception as error:
            if self.model_provider.model is None or self._is_distributed:
                job.fail(error)
                raise
            if not isinstance(error, RequestError):
                logger.exception("A request failed.")
            job.fail(error)
        finally:
            self._is_serving_alone = False

    def _prepare(self, job: Job) -> None:
        if job.prepared:
            return
        provider = self.model_provider
        found = prompt_of(job.request, job.args, provider, super()._tokenize)
        _, text_machine = self.state_machines(job)
        vocabulary = self._vocabularies.get(provider.model_key)
        if vocabulary is None:
            ids = provider.tokenizer.get_vocab().values()  # type: ignore[union-attr]
            self._vocabularies = {provider.model_key: frozenset(ids)}
            vocabulary = self._vocabularies[provider.model_key]
        job.prepare(found, provider.tokenizer, text_machine, vocabulary)
        self.services.cut(job)

    def state_machines(self, job: Job) -> tuple[Any, Any]:
        """What finds the end of a job: in tokens and in text."""
        provider = self.model_provider
        stop_words = job.args.stop_words
        machines = self._make_state_machine(provider.model_key, provider.tokenizer, stop_words)
        if job.request.request_type == "chat":
            return machines
        # a text is continued as it is, whatever marks the model's reasoning and calls of tools
        ends = {"normal": [(word, "normal") for word in stop_words]} if stop_words else None
        return machines[0], TextStateMachine(ends)

    def fetch(self, job: Job, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """The caches of the longest known prefix, and its length; at least one token is left.

        Raises:
            RequestError: the job is not admitted.
        """
        key = self.model_provider.model_key
        caches, rest = self.prompt_cache.fetch_nearest_cache(key, tokens)
        n_cached = len(tokens) - len(rest)
        self.admit(job, n_cached, caches)
        self.services.begun(job)
        return caches, n_cached

    def _admit(self, job: Job, n_cached: int, caches: list[Any] | None) -> None:
        batch = self._batch
        self.services.budget.admit(job, [] if batch is None else list(batch.jobs.values()))

    def keep(self, tokens: list[int], caches: list[Any], kind: str = "assistant") -> None:
        """Put caches of these tokens in the prompt cache."""
        try:
            key = self.model_provider.model_key
            self.prompt_cache.insert_cache(key, tokens, caches, cache_type=kind)
        except Exception:
            logger.exception("A cache could not be kept.")

    def _run_batch(self, batch: Batch) -> None:
        try:
            for _ in self._time_budget:
                if not batch.step():
                    break
            batch.remove(self._share_object(batch.cancelled()) or [])
        except Exception as error:
            if self._is_distributed:
                batch.fail(error)
                raise
            logger.exception("A batch failed; its requests go on one by one.")
            self._batch = None
            jobs = list(batch.jobs.values())
            batch.close()
            error = error.with_traceback(None)  # whose frames hold the batch's arrays
            if len(jobs) == 1:
                jobs[0].fail(error)
            else:
                for job in jobs:
                    job.alone = True
                self._waiting.extend(jobs)

    def _close_batch(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def is_over(self, job: Job) -> bool:
        """Whether to stop at once; machines that generate together go on to the end."""
        return (job.cancelled or self._stop) and not self._is_distributed
