"""A reasoner without weights: it reads a schema's words and asks the schema's questions.

It serves simulations, tests, and conversations over a video where no language model is at hand. It
performs the requests of :mod:`v2l_fast.conversation.prompts` from the prompt alone.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from v2l_fast.conversation.models import Message, ModelReply

Guess = Literal["uniform", "peaked", "none"]


class LexiconModel:
    """Finds a slot's values as words of what a person says.

    Args:
        guess: how readings fill the slots that the person has not stated: "uniform" over the
            values, "peaked" on the first value nine times of ten, or "none".
    """

    def __init__(self, guess: Guess = "none") -> None:
        self.guess = guess

    def complete(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 400,
        seed: int = 0,
        json: bool = False,
    ) -> list[ModelReply]:
        data = _data(messages)
        perform = getattr(self, f"_{data['request']}")
        return [ModelReply(perform(data, random.Random(seed + i))) for i in range(n)]

    def _readings(self, data: Mapping[str, Any], rng: random.Random) -> str:
        slots = data.get("slots", {})
        facts = []
        known = {fact["slot"]: fact for fact in data.get("facts", ()) if "slot" in fact}
        for name, slot in slots.items():
            values = slot.get("values", [])
            stated = [value for value in values if _mentions(data["utterance"], value)]
            if stated:
                facts.append(_fact(name, stated[-1], True))
            elif name in known:
                facts.append(_fact(name, known[name]["value"], True))
            elif values and self.guess != "none":
                sure = self.guess == "peaked" and rng.random() < 0.9
                facts.append(_fact(name, values[0] if sure else rng.choice(values), False))
        return json.dumps({"reply": "", "facts": facts})

    def _standalone(self, data: Mapping[str, Any], rng: random.Random) -> str:
        question = data["utterance"]
        if "?" not in question and data["history"]:
            # An answer to our question: what the person asked before is still open.
            question = next(
                (turn["person"] for turn in reversed(data["history"]) if "?" in turn["person"]),
                question,
            )
        focus = [fact["value"] for fact in data["facts"] if fact.get("slot") == "focus"]
        if focus and not _mentions(question, focus[-1]):
            question = re.sub(r"\bthe (?=object\b)", f"the {focus[-1]} ", question, count=1)
        return json.dumps({"question": question, "refers_to": focus})

    def _feedback(self, data: Mapping[str, Any], rng: random.Random) -> str:
        # Obeys the number that the policy "model" prints.
        action = data["action"] or ("ask" if data["gap"]["value"] > 1.0 else "answer")
        missing = data["gap"]["missing"]
        target = data["target"] or max(missing, key=missing.get, default=None)
        return json.dumps(
            {"feedback": "", "action": action, "target": target, "suggestion": data["draft"]}
        )

    def _select(self, data: Mapping[str, Any], rng: random.Random) -> str:
        return json.dumps({"ids": [fact["id"] for fact in data["facts"]]})

    def _refine(self, data: Mapping[str, Any], rng: random.Random) -> str:
        text = data["draft"] or "I see."
        if data["action"] == "ask":
            text = data.get("question", "Could you tell me more?")
        return json.dumps({"action": data["action"], "text": text})


def _data(messages: Sequence[Message]) -> dict[str, Any]:
    """The data of the request; a correction repeats nothing."""
    return next(
        json.loads(message["content"])
        for message in messages
        if message["role"] == "user" and message["content"].startswith("{")
    )


def _mentions(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


def _fact(slot: str, value: str, stated: bool) -> dict[str, Any]:
    return {"text": f"{slot}: {value}", "slot": slot, "value": value, "stated": stated}
