"""The shapes world: short videos of moving colored shapes whose content is known exactly.

It exists so that learning can be shown end to end on any CPU: a tiny vision-language model of the
same architecture as the real ones and the hypernetwork that adapts it. This package makes scenes,
videos, language, the two models' training runs and their evaluation; the methods themselves live in
the rest of `v2l_fast`.
"""
