"""Answer questions about several videos in one batch, each question with its own adapter.

python examples/one_batch_many_videos.py first.mp4 second.mp4 "What color is the object?"
"""

import sys

from v2l_fast import Adapter, Video2LoRA


def main(*arguments: str) -> None:
    *videos, question = arguments
    model = Video2LoRA.from_pretrained("shapes-any")
    adapters = model.internalize(videos)
    answers = model.ask([question] * len(videos), adapters)
    for video, answer in zip(videos, answers, strict=True):
        print(f"{video}: {answer}")
    # Adapters of consecutive chunks of one recording become one adapter.
    whole = Adapter.compose(adapters)
    print(f"all of them as one recording: {model.ask(question, whole)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
