"""Parts of `bench.runs.real_words`: a VLM whose decoder has SmolLM2's real weights."""
