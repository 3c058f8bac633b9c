"""The golden cases in tests/data/tokenizer, made with transformers 4.57.6, and random texts.

single.json: the ids of 145 texts by class and options; full_and_decode.json: special tokens, offsets and decoded text;
slow_vs_fast_mismatches.json: where the slow and the fast tokenizers of that version differ; rocbert: RoCBertTokenizer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tokenizer"
VOCAB = DATA / "vocab.txt"
ROCBERT = tuple(DATA / "rocbert" / name for name in ("vocab.txt", "word_shape.json", "word_pronunciation.json"))
OPTIONS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


def read(name: str) -> dict[str, Any]:
    """A golden file."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


SINGLE = read("single.json")
TEXTS: list[str] = SINGLE["texts"]


def golden_ids() -> list[tuple[str, dict[str, Any], list[list[int]]]]:
    """Class, options and the ids of TEXTS without special tokens."""
    cases = SINGLE["ids_without_special_tokens"]
    return [
        (case["tokenizer"], case["kwargs"], case["ids"] if "ids" in case else cases[case["same_as"]]["ids"])
        for case in cases
    ]


def fast_instead(options: dict[str, Any]) -> dict[str, list[str]]:
    """The texts where the slow and the fast tokenizer differ with these options -> the tokens of the fast one."""
    found = read("slow_vs_fast_mismatches.json")["mismatches"]
    wanted = [
        options.get("do_lower_case", True),
        options.get("strip_accents"),
        options.get("tokenize_chinese_chars", True),
    ]
    return {each["text"]: each["fast"] for each in found if [each["kwargs"][name] for name in OPTIONS] == wanted}


# Blocks of Unicode: Latin, marks, Greek, Cyrillic, Hebrew and Arabic, scripts of India, jamo, Korean, Chinese and its
# compatibility forms, Japanese, full width, punctuation, symbols, emoji, controls, and anything.
_BLOCKS = (
    *((0x20, 0x7E),) * 3,
    *((0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0xDFF)),
    *((0x1100, 0x11FF), (0x1E00, 0x1FFF), (0xAC00, 0xAC80), (0x4E00, 0x4E40), (0x20000, 0x2FA1F), (0xF900, 0xFAFF)),
    *((0x3000, 0x30FF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x2000, 0x206F), (0x2190, 0x2BFF), (0x1D400, 0x1D7FF)),
    *((0x1F300, 0x1FAFF), (0x0, 0x1F), (0x7F, 0xA0), (0x0, 0x10FFFF)),
)
_WORDS = ("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "[mask]", "[E1]", "new token", "covid", "zqzq", "yqyq", "Hello")
_MORE = ("CAFE\u0301", "\u0130", "\u03a3", "\u0391\u03a3", "'s", ".", "New-York", "[CL\x00S]", "\ufffd", "a\u0378b")
_BETWEEN = ("", "", "", " ", " ", "\u0301", "\t", "\u3000", "\u2028")


def random_texts(count: int, seed: int) -> list[str]:
    """Mixed scripts, marks, controls, emoji, words of the vocabularies, special and added tokens; no surrogates."""
    made = random.Random(seed)
    vocab = [line for file in (VOCAB, ROCBERT[0]) for line in file.read_text(encoding="utf-8").split("\n")]

    def part() -> str:
        kind = made.random()
        if kind < 0.3:
            return made.choice(_WORDS + _MORE)
        if kind < 0.6:
            return made.choice(vocab).removeprefix("##")
        first, last = made.choice(_BLOCKS)
        codes = [made.randint(first, last) for _ in range(made.randint(1, 4))]
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    return ["".join(part() + made.choice(_BETWEEN) for _ in range(made.randint(0, 12))) for _ in range(count)]
