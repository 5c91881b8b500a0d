"""From videos to adapters: parts of videos, and several of them through the model in one batch."""
