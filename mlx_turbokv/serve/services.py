"""What stands around generation: the prompt cache, the memory budget and the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from ..errors import InputError
from ..loading import distributed
from ..policy.recommended import label
from .checkpoints import only_grows, split_at_multiples
from .errors import RequestError
from .jobs import Job
from .memory import MemoryBudget
from .metrics import CONTENT_TYPE, Metrics
from .models import TurboModelProvider
from .prompt_cache import PromptCache


class Services:
    """The prompt cache, the memory budget and the metrics of a server.

    Args:
        provider: whose model is served.
        prompt_cache: caches of finished requests.
        queue: how many requests wait, and how many are generated.
    """

    def __init__(
        self,
        provider: TurboModelProvider,
        prompt_cache: PromptCache,
        queue: Callable[[], tuple[int, int]],
    ) -> None:
        options = provider.cli_args
        self.provider, self.prompt_cache = provider, prompt_cache
        self.every = options.checkpoint_every_n_tokens
        prompt_cache.serve_models(self._models)
        # machines that generate together must not decide differently
        limit = options.memory_limit if distributed.n_processes() == 1 else 0
        self.budget = MemoryBudget(limit, prompt_cache, options.prefill_step_size)
        self.metrics = Metrics(prompt_cache, self.budget, queue)
        self._key: Any = None
        self.keeps_marks = False  # whether the model's caches cannot simply go back

    def pages(self) -> dict[str, Callable[[], tuple[str, str]]]:
        """What else can be asked for, by path: each gives (content type, text)."""
        return {"/metrics": lambda: (CONTENT_TYPE, self.metrics.text().decode())}

    def take_model(self) -> None:
        """Take the sizes of the provider's model, if another one was loaded.

        Raises:
            InputError: it leaves no room for a request.
        """
        if self.provider.model_key == self._key:
            return
        models = self._models()
        loaded = self.provider._loaded
        self.keeps_marks = not all(only_grows(make_prompt_cache(model)) for model in models)
        self.budget.loaded(models, loaded.max_context if loaded else None)
        if loaded is not None:
            self.metrics.served(loaded.name, label(self.provider.cache_options["policy"]))
        self._key = self.provider.model_key
        self.provider.say_what_is_served()

    def take_asked_model(self) -> None:
        """As ``take_model``, for a model that a client named.

        Raises:
            RequestError: 413; it leaves no room for a request.
        """
        try:
            self.take_model()
        except InputError as error:
            raise RequestError(413, str(error), "model", "out_of_memory") from error

    def cut(self, job: Job) -> None:
        """Cut a job's prompt where copies of its recurrent states and windows are to be kept."""
        if self.keeps_marks and self.every and not job.alone:
            job.segments, job.types = split_at_multiples(job.segments, job.types, self.every)

    def begun(self, job: Job) -> None:
        """Count a job whose prompt is going to be read."""
        self.metrics.begun(len(job.prompt))

    def generated(self, job: Job) -> None:
        """Count a token."""
        started = getattr(getattr(job.choice, "answer", None), "started", None)
        self.metrics.generated(1, started if len(job.tokens) == 1 else None)

    def _models(self) -> list[Any]:
        provider = self.provider
        return [model for model in (provider.model, provider.draft_model) if model is not None]
