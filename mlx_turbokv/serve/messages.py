"""Messages, tools and the other objects within a request's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """An object whose unknown fields are ignored."""

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


class Named(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """The one tool that is asked for."""

    type: Literal["function"]
    function: Named


class StreamOptions(Strict):
    """What a stream adds."""

    include_usage: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
