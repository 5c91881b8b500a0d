"""What each benchmark asks: the prompts of the paper's Appendix B.

They are part of the measurement: with another wording the numbers are another benchmark's. The
appendix prints a question and its instruction as two paragraphs; here a space joins them, as in the
examples on the authors' page (where PLM-SGQA's questions stand without the instruction).
"""

from __future__ import annotations

ACTIVITYNET_CAPTIONS = "Describe what is happening in this video."
PLM_RDCAP = "Describe what happens in this video."
PLM_RCAP = "Describe what happens in this video clip."

# subset -> prompt
VDC = {
    "short": "Summarize this video in one detailed sentence.",
    "detailed": "Describe this video in detail.",
    "camera": "Describe the camera work, framing, and viewpoint in this video.",
    "background": "Describe the background, setting, and environment in this video.",
    "main_object": "Describe the main subject and its actions in this video.",
}
CAREBENCH = {
    "caption": (
        "Describe the video in as much useful visual detail as possible. Include the main "
        "activity, visible people or objects, scene context, appearance, and any important visual "
        "details that help explain what is happening."
    ),
    "events": (
        "Describe the key visible events in chronological order. Include all important actions "
        "and changes you can observe, with enough detail to distinguish each event clearly."
    ),
    "objects": (
        "Describe the important visible objects and entities in the video in as much useful "
        "detail as possible. Include their appearance, location, and role in the scene when "
        "visible."
    ),
    "spatial_caption": (
        "Describe the spatial layout in as much useful detail as possible: where the people, "
        "objects, and scene elements are located, how they are positioned relative to each other, "
        "and what parts of the scene are in the foreground, background, left, right, center, "
        "above, or below."
    ),
    "temporal_caption": (
        "Describe the temporal progression in as much useful detail as possible. Explain what "
        "happens over time, the order of visible actions, and how the scene or subjects change "
        "from the beginning to the end."
    ),
}


def question(text: str) -> str:
    """The one template of all four question benchmarks."""
    return f"{text.strip()} Answer only the question, in one sentence."
