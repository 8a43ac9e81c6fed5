"""A sentence hidden in a long text, and the question that asks for it.

A haystack is whole sentences of any text, starting at a random one; a needle goes between two of
them at the wanted depth. Everything random follows from the case's own name, so that each
configuration, and a run that is resumed, meets the same prompts.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InputError

KINDS = ("password", "number", "distractors")
N_DISTRACTORS = 4
MOST_CASES = 100_000
LONGEST_SENTENCE = 60  # words; longer ones are cut, so that depths and lengths stay fine-grained
CITIES = (
    "Bergen", "Bogota", "Cairo", "Dakar", "Dublin", "Genoa", "Hanoi", "Havana", "Izmir", "Jaipur",
    "Kyoto", "Lagos", "Lima", "Lisbon", "Malmo", "Nairobi", "Odessa", "Oslo", "Perth", "Porto",
    "Quito", "Riga", "Seoul", "Split", "Turin", "Utrecht", "Vienna", "Zagreb",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One needle at one depth of one context.

    kind: "password" (the paper's turbo-rainbow-42), "number" (a six-digit number of a city), or
        "distractors" (the same, with four other cities' numbers in the text).
    context: tokens of the prompt with its answer, at most.
    depth: where the needle is, 0 at the start and 1 at the end of the haystack.
    repeat: number of the repeat.
    """

    kind: str
    context: int
    depth: float
    repeat: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.context}/{self.depth:g}/{self.repeat}"


@dataclass(frozen=True)
class Prompt:
    """A case as tokens.

    tokens: up to the word before the answer.
    answer_tokens: the answer as it continues them.
    answer: the answer as text.
    """

    tokens: list[int]
    answer_tokens: list[int]
    answer: str


class _Start(NamedTuple):
    """What follows from a case's name: its facts, the first sentence, distractors' places."""

    needle: str
    question: str
    lead: str
    answer: str
    answer_tokens: list[int]
    distractors: list[str]
    start: int
    places: list[float]


def make_cases(
    contexts: Sequence[int], depths: Sequence[float], kinds: Sequence[str], repeats: int = 1
) -> list[Case]:
    """All cases, repeat by repeat, shuffled within one: an interrupted run has every kind.

    Raises: InputError for an unknown kind, a depth outside 0 to 1, or a number below 1.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"Unknown needle {kind!r}: accepted are {', '.join(KINDS)}.")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"Depth {depth:g} is not accepted: it must be from 0 to 1.")
    if repeats < 1:
        raise InputError(f"Repeats {repeats} are not accepted: at least 1 is needed.")
    if (n := len(contexts) * len(depths) * len(kinds) * repeats) > MOST_CASES:
        raise InputError(f"{n:,} cases are not accepted: at most {MOST_CASES:,} can be run.")
    cases = {
        Case(kind, context, depth, repeat)
        for repeat in range(repeats) for depth in depths for kind in kinds for context in contexts
    }  # fmt: skip
    return sorted(
        cases, key=lambda case: (case.repeat, hashlib.sha256(case.name.encode()).digest())
    )


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, long ones cut.

    Raises: InputError if there are fewer than two.
    """
    found = []
    for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
        words = piece.split()
        for start in range(0, len(words), LONGEST_SENTENCE):
            found.append(" ".join(words[start : start + LONGEST_SENTENCE]))
    if len(found) < 2:
        raise InputError("The text has fewer than two sentences, so nothing can be hidden in it.")
    return found


class Haystack:
    """Builds prompts from a text for a tokenizer.

    Raises: InputError if the text is too short to split.
    """

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer = tokenizer
        self.sentences = split_sentences(text)
        self.lengths = [len(self._encode(" " + s)) for s in self.sentences]

    def prompt(self, case: Case) -> Prompt:
        """A case's prompt: at most ``case.context`` tokens together with its answer.

        Raises: InputError if not even one sentence of the haystack fits.
        """
        at = self._start(case)
        room = case.context - len(at.answer_tokens)
        bare = len(self._tokens([at.needle, *at.distractors], at.question, at.lead))
        chosen, used = [], bare
        for i in range(at.start, at.start + 100 * len(self.sentences)):
            used += self.lengths[i % len(self.sentences)]
            if chosen and used > room:
                break
            chosen.append(self.sentences[i % len(self.sentences)])
        while chosen:
            tokens = self._around(case, at, chosen)
            if len(tokens) <= room:
                return Prompt(tokens, at.answer_tokens, at.answer)
            chosen.pop()
        raise self._too_short([case])

    def check(self, cases: Sequence[Case]) -> None:
        """Check that every case has room for its needle and one sentence, before any is run.

        Raises: InputError.
        """
        short = [case for case in cases if self._least(case) > case.context]
        if short:
            raise self._too_short([c for c in cases if c.context in {s.context for s in short}])

    def _too_short(self, cases: Sequence[Case]) -> InputError:
        context = min(case.context for case in cases)
        least = max(self._least(case) for case in cases if case.context == context)
        return InputError(
            f"A context of {context} tokens is too short for a needle: with its question, its "
            f"answer and one sentence of the text it takes up to {least} tokens here."
        )

    def _least(self, case: Case) -> int:
        """Tokens of a case with one sentence of the text."""
        at = self._start(case)
        first = [self.sentences[at.start]]
        return len(self._around(case, at, first)) + len(at.answer_tokens)

    def _start(self, case: Case) -> _Start:
        rng = random.Random(case.name)
        needle, question, lead, answer, distractors = _facts(case, rng)
        start = rng.randrange(len(self.sentences))
        places = [rng.random() for _ in distractors]
        answer_tokens = self._answer_tokens(lead, answer)
        return _Start(needle, question, lead, answer, answer_tokens, distractors, start, places)

    def _around(self, case: Case, at: _Start, sentences: list[str]) -> list[int]:
        facts = [(case.depth, at.needle), *zip(at.places, at.distractors)]
        return self._tokens(_hidden(sentences, facts), at.question, at.lead)

    def _tokens(self, sentences: list[str], question: str, lead: str) -> list[int]:
        body = " ".join(sentences)
        if getattr(self.tokenizer, "has_chat_template", False):
            message = {"role": "user", "content": f"{body}\n\n{question}"}
            head = self.tokenizer.apply_chat_template([message], add_generation_prompt=True)
        else:
            head = list(self.tokenizer.encode(f"{body}\n\nQuestion: {question}\nAnswer:"))
            lead = " " + lead
        return [*head, *self._encode(lead)]

    def _answer_tokens(self, lead: str, answer: str) -> list[int]:
        before, whole = self._encode(lead), self._encode(f"{lead} {answer}")
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._encode(f" {answer}")

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def is_found(response: str, answer: str) -> bool:
    """Whether a response begins with exactly the answer, quotes and spaces aside."""
    return re.match(rf"[\W_]*{re.escape(answer)}(?!\w)", response) is not None


def _facts(case: Case, rng: random.Random) -> tuple[str, str, str, str, list[str]]:
    """(needle, question, how the answer begins, answer, distractors)."""
    if case.kind == "password":
        fact = "The secret password is"
        return (
            f"{fact} turbo-rainbow-42.",
            "What is the secret password?",
            fact,
            "turbo-rainbow-42",
            [],
        )
    cities = rng.sample(CITIES, 1 + N_DISTRACTORS)
    numbers = [str(n) for n in rng.sample(range(100_000, 1_000_000), len(cities))]
    facts = [f"The special number of {city} is" for city in cities]
    others = [f"{f} {n}." for f, n in zip(facts[1:], numbers[1:])]
    question = f"What is the special number of {cities[0]}?"
    distractors = others if case.kind == "distractors" else []
    return f"{facts[0]} {numbers[0]}.", question, facts[0], numbers[0], distractors


def _hidden(sentences: list[str], facts: list[tuple[float, str]]) -> list[str]:
    """The sentences with each fact inserted at its depth."""
    at: dict[int, list[str]] = {}
    for depth, fact in facts:
        at.setdefault(round(depth * len(sentences)), []).append(fact)
    found = []
    for i in range(len(sentences) + 1):
        found += at.get(i, [])
        found += sentences[i : i + 1]
    return found
