"""Text to ids and back: BertTokenizer, ConvBertTokenizer and RoCBertTokenizer, over the `tokenizers` package.

A tokenizer is built up in steps: `vocabulary` (tokens and their roles), `ids` (special tokens around ids, padding) and
`texts` (the call); `bert` and `roc_bert` are what users construct. `rows` truncates, `python_splitter` is the
algorithm in Python for what the `tokenizers` package can't do, `files` reads and writes folders.
"""

from fastconv.tokenization.batch_encoding import BatchEncoding
from fastconv.tokenization.bert import BertTokenizer, BertTokenizerFast, ConvBertTokenizer, ConvBertTokenizerFast
from fastconv.tokenization.files import FILES
from fastconv.tokenization.roc_bert import RoCBertTokenizer

__all__ = [
    "FILES",
    "BatchEncoding",
    "BertTokenizer",
    "BertTokenizerFast",
    "ConvBertTokenizer",
    "ConvBertTokenizerFast",
    "RoCBertTokenizer",
]
