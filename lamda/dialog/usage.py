"""What `lamda chat --help` and `lamda serve --help` say; it imports nothing, so that help is quick."""

from __future__ import annotations

USAGE = "[--candidates N] [--threshold P] [--tools NAMES [--corpus PATH] [--glossary FILE]] [--int8] ..."
DETAILS = """\
--candidates N         sampled for each reply; default 16
--threshold P          of P(unsafe), above which a candidate is dropped; default 0.5 (the paper names none)
--refusal TEXT         what is said where every candidate was dropped
--tools NAMES          calculator,translator,retrieval: some of them; the model then researches before it answers
--corpus PATH          a folder (.txt .md .rst .py .jsonl) or a JSON-lines file that the tool retrieval searches
--glossary FILE        JSON lines of your own words for the tool translator, in place of Argos Translate's models
--max-queries N        to the tools for one reply; default 4
--max-new-tokens N     of a candidate; default 128
--int8                 the weights in 8 bits"""
SAMPLING = """\
--temperature T        default 1
--top-k K              default 40
--top-p P              default 1
--repetition-penalty R default 1
--seed N               the same seed and conversation give the same reply; default 0"""
