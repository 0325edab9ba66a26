"""Train the demo model's tokenizer: 2,048 byte-level BPE tokens, single digits, and a chat template."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

DOMAINS = ("code", "tools", "prose", "math")
VOCABULARY = 2048
CONTEXT = 1024
END_OF_TEXT, TURN_START, TURN_END, CALL_START, CALL_END = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>",
)  # fmt: skip
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, CALL_START, CALL_END)
CHARACTERS_PER_DOMAIN = 2_500_000

WORDS = r"\n| {2,}(?! )|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
"""Newlines, indentation, single digits, words and runs of punctuation; no token crosses these borders."""

CONFIG = {
    "additional_special_tokens": [TURN_START, TURN_END],
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": END_OF_TEXT,
    "model_max_length": CONTEXT,
    "pad_token": END_OF_TEXT,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
"""Written by hand, so that transformers before 5 reads it too."""

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def train_tokenizer(corpus: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Train on the corpus, save to `folder`, and return the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    _with_visible_calls(tokenizer).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / CHAT_TEMPLATE.name).write_text(CHAT_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def _with_visible_calls(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with calls that `skip_special_tokens` leaves in the text, as Qwen's own tokenizers have it."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in (CALL_START, CALL_END)
    return Tokenizer.from_str(json.dumps(state))


def _texts(corpus: Path) -> Iterator[str]:
    """The first rows of every domain as plain text; conversations with their roles, schemas and calls."""
    for domain in DOMAINS:
        taken = 0
        for line in (corpus / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row["text"] if "text" in row else _flattened(row)
            yield text
            taken += len(text)
            if taken > CHARACTERS_PER_DOMAIN:
                break


def _flattened(row: dict) -> str:
    """A conversation without the template's special tokens."""
    schemas = [json.dumps(tool["function"]) for tool in row.get("tools", [])]
    turns = [
        "\n".join(
            [
                message["role"],
                message["content"],
                *(json.dumps(call["function"]) for call in message.get("tool_calls", [])),
            ]
        )
        for message in row["messages"]
    ]
    return "\n".join(schemas + turns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    train_tokenizer(arguments.corpus, arguments.folder)
