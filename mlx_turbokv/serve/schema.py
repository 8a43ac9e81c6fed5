"""What a request may hold: OpenAI's fields, and those that mlx_lm.server adds.

A field's description is what its error message asks for. Fields that the server does not know are
ignored, as clients send many; so are known ones that ask for nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
StopWord = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
_PENALTY = "a number from -100 to 100"
_SHARE = "a number from 0 to 1"
_CONTEXT = f"a whole number from 0 to {MOST_TOKENS}"
_MODEL = "the name of a model that /v1/models lists"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Kept(BaseModel):
    """Passed on to the chat template, with the fields that only it may know."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Function(_Kept):
    """A function that a message calls."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(_Kept):
    """A call of a tool, in a message of the assistant."""

    id: str | None = None
    type: str | None = None
    function: Function


class ImageURL(_Kept):
    """Where an image is."""

    url: str


class Part(_Kept):
    """A part of a message: text or an image."""

    type: str
    text: str | None = None
    image_url: ImageURL | str | None = None
    image: ImageURL | str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Part:
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type text needs its text")
        return self


class Message(_Kept):
    """A message of a chat."""

    role: Annotated[str, Field(min_length=1)]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class ToolFunction(_Kept):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Kept):
    """A tool that the model may use."""

    type: Literal["function"]
    function: ToolFunction


class Named(_Strict):
    """The name of a function."""

    name: str


class ToolChoice(_Strict):
    """The one tool that is asked for."""

    type: Literal["function"]
    function: Named


class StreamOptions(_Strict):
    """What a stream adds."""

    include_usage: bool | None = None


class ResponseFormat(_Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]


class Body(_Strict):
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
    xtc_threshold: Share | None = Field(None, description=_SHARE)
    repetition_penalty: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description=f"0 for none, or a number from {LEAST_FACTOR} to 100"
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
    stop: str | Annotated[list[StopWord], Field(max_length=64)] | None = Field(
        None, description="a text or up to 64 texts, each of 1 to 1000 characters"
    )
    num_draft_tokens: Annotated[int, Field(ge=1, le=MOST_DRAFT_TOKENS)] | None = Field(
        None, description=f"a whole number from 1 to {MOST_DRAFT_TOKENS}"
    )
    user: str | None = Field(None, description="a text")

    @model_validator(mode="after")
    def _agrees(self) -> Body:
        penalty = self.repetition_penalty
        if penalty is not None and 0 < penalty < LEAST_FACTOR:
            raise ValueError(
                f"repetition_penalty {penalty} is not accepted: give 0 for none, or a number from "
                f"{LEAST_FACTOR} to 100"
            )
        if isinstance(self.stop, str) and len(self.stop) > 1000:
            raise ValueError("stop is longer than 1000 characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only accepted with stream: true")
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
    top_logprobs: Annotated[int, Field(ge=-1, le=20)] | None = Field(
        None, description="a whole number from 0 to 20"
    )

    @model_validator(mode="after")
    def _names_a_tool(self) -> ChatBody:
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools or []]
            if self.tool_choice.function.name not in names:
                raise ValueError(
                    f"tool_choice names the function {self.tool_choice.function.name!r}, which "
                    "tools does not have"
                )
        return self


class TextBody(Body):
    """A request for a text completion."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="a text, a list of texts, a list of tokens or a list of such lists")
    echo: bool | None = Field(None, description="true or false")
    suffix: Literal[""] | None = Field(None, description="no suffix: models cannot fill in here")
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description="the same number as n"
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="true, false or a whole number from 0 to 20"
    )
    top_logprobs: Annotated[int, Field(ge=-1, le=20)] | None = Field(
        None, description="a whole number from 0 to 20"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> TextBody:
        n = self.n or 1
        if self.best_of not in (None, n):
            raise ValueError(f"best_of {self.best_of} is not accepted: give the same number as n")
        if n * len(self.prompts()) > MOST_PROMPTS:
            raise ValueError(
                f"n = {n} for {len(self.prompts())} prompts is not accepted: give at most "
                f"{MOST_PROMPTS} choices in all"
            )
        if self.echo and self.logprobs:
            raise ValueError("echo is not accepted together with logprobs")
        return self

    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
