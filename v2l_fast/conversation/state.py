"""What a CPER conversation is made of: its models, its state, and what a turn gives.

Data only. :mod:`v2l_fast.conversation.cper` takes a state to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from v2l_fast.conversation.gap import Array
from v2l_fast.conversation.models import ChatModel, Encoder
from v2l_fast.conversation.persona import Fact, Persona


@dataclass(frozen=True)
class Models:
    """Who does what.

    Attributes:
        reasoner: reads the person, judges and writes replies.
        encoder: facts to vectors.
        answerer: knows the matter, one question at a time: the frozen VLM with a video's adapter.
            Without one the reasoner answers.
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
    """What is not known about the person, and beside it, never mixed in, about a video.

    Attributes:
        value: the gap that decides; about 0.5 to 1.5.
        kind: "cper" or "slots"; "none" where nothing was measured.
        uncertainty, alignment, conflict: its parts, about the person.
        normalized: the value where 0 is "nothing is missing".
        missing: slot -> how much asking for it would tell.
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
        turns: the last exchanges; all of them where no window limits them.
        vectors: for each of ``turns`` the vector [d] of its facts; None for a turn without any.
        asked: slot or target -> how often it was asked for.
        number: turns so far.
        stopped: the person is not asked any more.
    """

    persona: Persona = Persona()
    turns: tuple[Turn, ...] = ()
    vectors: tuple[Array | None, ...] = ()
    asked: Mapping[str, int] = field(default_factory=dict)
    number: int = 0
    stopped: bool = False

    def forget(self, ids: Sequence[str]) -> State:
        """Remove facts, and every turn in which their words stand.

        The vectors go as a whole, since each was made of all that was known at its time.

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
    """What the video's model answered.

    Attributes:
        question: the question, made self-contained.
        text: the answer.
        uncertainty: of the sampled answers.
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
    """What a turn gives.

    Attributes:
        text: the reply.
        action: "answer", "ask" or "both".
        target: slot, or words, that a question asks for.
        gap: what was not known before it.
        facts: new facts about the person.
        selected: ids of the facts that the reply was fitted to.
        feedback: the model's judgment of its draft.
        video: what the video's model answered; None without one.
        calls, prompt_tokens, new_tokens: cost.
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
