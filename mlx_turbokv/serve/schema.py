"""What a request may hold: OpenAI's fields, and those that mlx_lm.server adds.

A field's description is what its error message asks for. Fields that the server does not know are
ignored, as clients send many; so are known ones that ask for nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ..errors import short
from .messages import Message, ResponseFormat, StreamOptions, Strict, Tool, ToolChoice

MOST_TOKENS = 1 << 24
MOST_CHOICES = 128
MOST_PROMPTS = 2048
MOST_DRAFT_TOKENS = 1024
# Beyond these, half precision gives scores that are not numbers.
MOST_BIAS = 10_000.0
LEAST_FACTOR = 0.01
Name = Annotated[str, Field(min_length=1, max_length=4096)]
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1)]
StopText = Annotated[str, Field(max_length=1000)]
StopWord = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
_PENALTY = "a number from -100 to 100"
_SHARE = "a number from 0 to 1"
_CONTEXT = f"a whole number from 0 to {MOST_TOKENS}"
_TOP = "a whole number from 0 to 20; -1 for none"
_MODEL = "the name of a model that /v1/models lists"


def refusal(param: str, message: str) -> PydanticCustomError:
    """The error for fields that do not go together.

    Args:
        param: the field that is meant.
        message: a sentence without its full stop.
    """
    return PydanticCustomError("fields", "{message}", {"param": param, "message": message})


def _factor(penalty: float) -> float:
    if 0 < penalty < LEAST_FACTOR:
        raise ValueError("too small a factor")
    return penalty


class Body(Strict):
    """The fields that both kinds of completions have."""

    model: Name | None = Field(None, description=_MODEL)
    draft_model: Name | None = Field(None, description=_MODEL)
    adapters: Name | None = Field(None, description="the name of adapters that the server allows")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object such as {"include_usage": true}'
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description=f"a whole number from 1 to {MOST_CHOICES}"
    )
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = Field(
        None, description=f"a whole number from 1 to {MOST_TOKENS}"
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = Field(
        None, description=f"a whole number from 1 to {MOST_TOKENS}"
    )
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="a number from 0 to 1000"
    )
    top_p: Share | None = Field(None, description=_SHARE)
    top_k: Annotated[int, Field(ge=0)] | None = Field(
        None, description="a whole number below the size of the vocabulary; 0 for no limit"
    )
    min_p: Share | None = Field(None, description=_SHARE)
    xtc_probability: Share | None = Field(None, description=_SHARE)
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = Field(
        None, description="a number from 0 to 0.5"
    )
    repetition_penalty: Annotated[float, Field(ge=0, le=100), AfterValidator(_factor)] | None = (
        Field(None, description=f"0 for none, or a number from {LEAST_FACTOR} to 100")
    )
    repetition_context_size: Count | None = Field(None, description=_CONTEXT)
    presence_penalty: Penalty | None = Field(None, description=_PENALTY)
    presence_context_size: Count | None = Field(None, description=_CONTEXT)
    frequency_penalty: Penalty | None = Field(None, description=_PENALTY)
    frequency_context_size: Count | None = Field(None, description=_CONTEXT)
    logit_bias: (
        dict[
            Annotated[int, Field(ge=0)],
            Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)],
        ]
        | None
    ) = Field(
        None,
        description="an object with the numbers of tokens and, for each, a number from "
        f"{-MOST_BIAS:.0f} to {MOST_BIAS:.0f}",
    )
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = Field(
        None, description="a whole number of 64 bits"
    )
    stop: StopText | Annotated[list[StopWord], Field(max_length=64)] | None = Field(
        None, description="a text or up to 64 texts, each of 1 to 1000 characters"
    )
    num_draft_tokens: Annotated[int, Field(ge=1, le=MOST_DRAFT_TOKENS)] | None = Field(
        None, description=f"a whole number from 1 to {MOST_DRAFT_TOKENS}"
    )
    user: str | None = Field(None, description="a text")

    @model_validator(mode="after")
    def _agrees(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options is only accepted with stream: true")
        top: Any = getattr(self, "top_logprobs", None)
        if getattr(self, "logprobs", None) is False and top is not None and top > 0:
            raise refusal(
                "top_logprobs",
                f"top_logprobs {top} is not accepted with logprobs: false: give logprobs: true",
            )
        return self


class ChatBody(Body):
    """A request for a chat completion."""

    messages: Annotated[list[Message], Field(min_length=1)] = Field(
        description="a list of messages, each with a role and content"
    )
    tools: list[Tool] | None = Field(
        None, description="a list of tools of type function, each with the function's name"
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None, description="none, auto, required, or an object that names a function"
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    response_format: ResponseFormat | None = Field(
        None, description="an object with the type text, json_object or json_schema"
    )
    role_mapping: dict[str, str] | None = Field(None, description="an object of texts")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: Annotated[int, Field(ge=-1, le=20)] | None = Field(None, description=_TOP)

    @model_validator(mode="after")
    def _names_a_tool(self) -> ChatBody:
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools or []]
            if self.tool_choice.function.name not in names:
                raise refusal(
                    "tool_choice",
                    f"tool_choice names the function {short(self.tool_choice.function.name)}, "
                    "which tools does not have",
                )
        return self


def _kind(prompt: Any) -> str | None:
    """Which kind of prompt is meant, by its first entry."""
    if isinstance(prompt, list):
        first = prompt[0] if prompt else ""
        return {list: "lists", int: "tokens", float: "tokens"}.get(type(first), "texts")
    return "text" if isinstance(prompt, str) else None


class TextBody(Body):
    """A request for a text completion."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS), Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS), Tag("lists")],
        Discriminator(_kind),
    ] = Field(
        description="a text, a list of texts, a list of tokens or a list of such lists; at most "
        f"{MOST_PROMPTS} prompts"
    )
    echo: bool | None = Field(None, description="true or false")
    suffix: Literal[""] | None = Field(None, description="no suffix: models cannot fill in here")
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description="the same number as n"
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="true, false or a whole number from 0 to 20"
    )
    top_logprobs: Annotated[int, Field(ge=-1, le=20)] | None = Field(None, description=_TOP)

    @model_validator(mode="after")
    def _is_possible(self) -> TextBody:
        n = self.n or 1
        if self.best_of not in (None, n):
            raise refusal(
                "best_of", f"best_of {self.best_of} is not accepted: give the same number as n"
            )
        if n * len(self.prompts()) > MOST_PROMPTS:
            raise refusal(
                "n",
                f"n = {n} for {len(self.prompts())} prompts is not accepted: give at most "
                f"{MOST_PROMPTS} choices in all",
            )
        if self.echo and self.logprobs:
            raise refusal("echo", "echo is not accepted together with logprobs")
        return self

    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
