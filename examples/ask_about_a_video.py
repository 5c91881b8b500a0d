"""Internalize a video once, then ask about it without any visual token in context.

python examples/ask_about_a_video.py clip.mp4 "What happens in the video?"
"""

import sys

from v2l_fast import Video2LoRA


def main(video: str, *questions: str) -> None:
    model = Video2LoRA.from_pretrained("shapes-any")
    adapter = model.internalize(video)
    for question in questions or ("What happens in the video?",):
        print(f"{question} {model.ask(question, adapter)}")
    # Not every adapter does something: compare the answers with and without it.
    print(f"without the adapter: {model.ask(questions[0] if questions else 'What happens?')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
