"""CPER: conversations that measure what they do not know about a person, ask, and adapt replies.

After Baskar et al., "CPER: From Guessing to Asking" (NAACL-SRW 2025). They work over a video's
adapter or with any chat model alone. ``gap`` holds the formulas, ``persona`` the facts about a
person, and ``cper`` the turn.
"""

from v2l_fast.conversation.cper import cper_turn
from v2l_fast.conversation.models import (
    EndpointModel,
    TransformersModel,
    VideoModel,
    load_chat_model,
    load_encoder,
)
from v2l_fast.conversation.persona import Fact, Persona
from v2l_fast.conversation.policy import CperSettings
from v2l_fast.conversation.prompts import LexiconModel
from v2l_fast.conversation.schema import Schema, Slot
from v2l_fast.conversation.state import KnowledgeGap, Models, Reply, State, Turn, VideoAnswer

__all__ = [
    "CperSettings",
    "EndpointModel",
    "Fact",
    "KnowledgeGap",
    "LexiconModel",
    "Models",
    "Persona",
    "Reply",
    "Schema",
    "Slot",
    "State",
    "TransformersModel",
    "Turn",
    "VideoAnswer",
    "VideoModel",
    "cper_turn",
    "load_chat_model",
    "load_encoder",
]
