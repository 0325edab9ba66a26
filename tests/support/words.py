"""Tokenizers of whole words, so that a test can write down what it expects, and chat templates in the manner of known
models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.recipe.schema import CalibrationSpec

SPECIAL = (
    "<s>",
    "<eos>",
    "<unk>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<|tool|>",
    "<think>",
    "</think>",
    "<call>",
    "</call>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|calling|>",
    "<|im_start|>",
    "<|im_end|>",
)

CHATML = """{%- if tools %}{{ '<|system|> ' + (tools | tojson) + ' <|im_end|> ' }}{% endif %}{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|> assistant ' }}{% generation %}{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}{{ ' <call> ' + c.function.name }}
{%- for k, v in c.function.arguments.items() %}{{ ' ' ~ k ~ ' ' ~ v }}{% endfor %}{{ ' </call>' }}{% endfor %}
{{- ' <|im_end|>' }}{% endgeneration %}{{ ' ' }}
{%- else %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endif %}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"""

PLAIN_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same text without marks: spans come from prefix rendering."""

GLM = """<s>{%- if tools %}<|system|> tools {% for t in tools %}{{ t.function.name + ' ' }}{% endfor %}{% endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}<|user|> {{ m.content }}
{%- elif m.role == 'assistant' %}<|assistant|>
{%- if loop.index0 > ns.last_user and m.reasoning_content %}<think> {{ m.reasoning_content }} </think>
{%- else %}</think>{% endif %}
{%- if m.content %} {{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}<call> {{ c.function.name }}
{%- for k, v in c.function.arguments.items() %} {{ k }} {{ v }}{% endfor %} </call>{% endfor %}
{%- elif m.role == 'tool' %}<|observation|> {{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|><think>{% endif %}"""
"""Generation prompts open a thought that turns without one do not have; thoughts before the last user turn are
removed."""

HARMONY = """{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|start|> functions to assistant <|channel|> commentary <|message|> ' + m.content + ' <|end|> ' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- if m.thinking %}{{ '<|start|> assistant <|channel|> analysis <|message|> ' + m.thinking + ' <|end|> ' }}{% endif %}
{{- '<|start|> assistant to ' + m.tool_calls[0].function.name + ' <|channel|> commentary <|message|> ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ ' <|calling|> ' }}
{%- elif m.role == 'assistant' %}{{ '<|start|> assistant <|channel|> final <|message|> ' + m.content }}
{{- ' <|return|> ' if loop.last else ' <|end|> ' }}
{%- else %}{{ '<|start|> ' + m.role + ' <|message|> ' + m.content + ' <|end|> ' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|> assistant ' }}{% endif %}"""
"""Channels; a final answer ends with <|return|> only where it is the last turn."""

QWEN = """{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|> ' + m.role + ' ' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last_user %}
{{- '<think> ' + (m.reasoning_content or '') + ' </think> ' }}{% endif %}
{{- m.content + ' <|im_end|> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"""
"""The last answer gets a thought, perhaps an empty one, which it loses as soon as another user turn follows."""


def word_tokenizer(
    directory: Path, texts: Iterable[str], template: str | None = None, *, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Saves and returns a tokenizer that splits at blanks and knows the words of `texts`; `bos`: it puts <s> before
    text."""
    words = sorted({word for text in texts for word in text.split()} - set(SPECIAL))
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSONL; a string is written as it is."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def spec(*mix: Mapping[str, Any], **fields: Any) -> CalibrationSpec:
    """A calibration of these mix entries."""
    return CalibrationSpec.model_validate(
        {"mix": mix, **({} if "tokens" in fields else {"samples": 1}), **fields}, strict=False
    )


def shown(tokens: CalibrationTokens, tokenizer: Any, row: int) -> str:
    """A row in words: assistant tokens in brackets, `|` between samples."""
    read = tokens.row(row)
    words = []
    for position, token in enumerate(read.input_ids.tolist()):
        if position and read.sample[position] != read.sample[position - 1]:
            words.append("|")
        word = tokenizer.convert_ids_to_tokens(token)
        words.append(f"[{word}]" if read.assistant[position] else word)
    return " ".join(words)


def all_shown(tokens: CalibrationTokens, tokenizer: Any) -> list[str]:
    return [shown(tokens, tokenizer, row) for row in range(tokens.num_rows)]
