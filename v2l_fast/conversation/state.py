"""The data of a CPER conversation: its models, its state, and the result of a turn.

:mod:`v2l_fast.conversation.cper` computes the next state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from v2l_fast.conversation.gap import Array
from v2l_fast.conversation.models import ChatModel, Encoder
from v2l_fast.conversation.persona import Fact, Persona


@dataclass(frozen=True)
class Models:
    """The models of a conversation.

    Attributes:
        reasoner: reads the person, judges and writes replies.
        encoder: encodes facts as vectors.
        answerer: answers single questions about the subject: the frozen VLM with a video's adapter.
            None lets the reasoner answer.
    """

    reasoner: ChatModel
    encoder: Encoder
    answerer: ChatModel | None = None


@dataclass(frozen=True)
class Turn:
    """One exchange."""

    user: str
    reply: str
    action: str
    target: str | None


@dataclass(frozen=True)
class KnowledgeGap:
    """What is not known about the person and, always apart from that, about a video.

    Attributes:
        value: the gap that the policy uses; about 0.5 to 1.5.
        kind: "cper" or "slots"; "none" if nothing was measured.
        uncertainty, alignment, conflict: its parts, about the person.
        normalized: the value on the scale on which 0 means that nothing is missing.
        missing: slot -> how informative a question about it would be.
        video: uncertainty of the answers about the video; None without one.
    """

    value: float
    kind: str
    uncertainty: float
    alignment: float
    conflict: float
    normalized: float
    missing: Mapping[str, float]
    video: float | None = None


@dataclass(frozen=True)
class State:
    """A conversation between two turns.

    Attributes:
        persona: what is known about the person.
        turns: the last exchanges; all of them if no window limits them.
        vectors: for each of ``turns`` the vector [d] of its facts; None for a turn without any.
        asked: slot or target -> number of questions about it.
        number: number of turns so far.
        stopped: whether the conversation asks no further question.
    """

    persona: Persona = Persona()
    turns: tuple[Turn, ...] = ()
    vectors: tuple[Array | None, ...] = ()
    asked: Mapping[str, int] = field(default_factory=dict)
    number: int = 0
    stopped: bool = False

    def forget(self, ids: Sequence[str]) -> State:
        """Remove facts, and every turn that contains their words.

        All vectors are removed, because each encodes every fact that was known at its time.

        Raises:
            ConfigError: an id is unknown.
        """
        first = self.number - len(self.turns)
        sources = {fact.turn - first for fact in self.persona.facts if fact.id in set(ids)}
        traces = self.persona.traces(ids)
        turns = tuple(
            Turn("", "", turn.action, None)
            if i in sources or traces.found_in((turn.user, turn.reply, turn.target or ""))
            else turn
            for i, turn in enumerate(self.turns)
        )
        return replace(
            self,
            persona=self.persona.forget(ids),
            turns=turns,
            vectors=(None,) * len(turns),
            asked={name: n for name, n in self.asked.items() if not traces.found_in((name,))},
        )


@dataclass(frozen=True)
class VideoAnswer:
    """An answer of the video's model.

    Attributes:
        question: the question, made self-contained.
        text: the answer.
        uncertainty: uncertainty of the sampled answers.
        unsure: the answer is not certain, and the reply says so.
        looked_again: the answer comes from the video in context instead of from its adapter.
    """

    question: str
    text: str
    uncertainty: float
    unsure: bool = False
    looked_again: bool = False


@dataclass(frozen=True)
class Reply:
    """The result of a turn.

    Attributes:
        text: the reply.
        action: "answer", "ask" or "both".
        target: slot, or words, that a question asks for.
        gap: what was not known before the turn.
        facts: new facts about the person.
        selected: ids of the facts that the reply takes into account.
        feedback: the model's judgment of its draft.
        video: the answer of the video's model; None without a video.
        calls, prompt_tokens, new_tokens: numbers of requests and tokens.
        unreadable: requests whose replies could not be read.
        seconds: duration of the turn.
    """

    text: str
    action: str
    target: str | None
    gap: KnowledgeGap
    facts: tuple[Fact, ...] = ()
    selected: tuple[str, ...] = ()
    feedback: str = ""
    video: VideoAnswer | None = None
    calls: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    unreadable: tuple[str, ...] = ()
    seconds: float = 0.0
