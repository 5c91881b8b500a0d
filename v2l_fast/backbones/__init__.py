"""What differs between VLM families, behind one interface; nothing outside this package names one.

A backbone offers ``decoder`` (:class:`~v2l_fast.backbones.decoder.Decoder`), ``tokenizer``,
``stop_ids``, ``name_or_path``, ``context(clip, ...)``, ``question(text)`` and
``question_about(clip, text, ...)``, the last three returning embedded prompts.
"""

from v2l_fast.backbones.loading import load_backbone

__all__ = ["load_backbone"]
