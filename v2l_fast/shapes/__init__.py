"""The shapes world: short videos of moving colored shapes whose content is known exactly.

It demonstrates learning end to end on any CPU, with a tiny vision-language model of the same
architecture as the real ones and the hypernetwork that adapts it. This package contains the scenes,
the videos, the language, the training of both models and their evaluation; the methods themselves
are in the rest of `v2l_fast`.
"""
