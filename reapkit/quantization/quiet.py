"""Silences llm-compressor's log lines per matrix and its own progress bars."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import tqdm
import transformers
from loguru import logger

LIBRARIES = ("llmcompressor", "compressed_tensors", "auto_round")
LOGGERS = ("torch.fx._symbolic_trace", "autoround")
LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block the libraries neither log nor draw; what was set before is restored."""
    _import_silently()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    verbosity = transformers.utils.logging.get_verbosity()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    draws = tqdm.tqdm.__init__

    def hidden(self: tqdm.tqdm, *args: Any, **kwargs: Any) -> None:
        draws(self, *args, **{**kwargs, "disable": True})

    for name in LIBRARIES:
        logger.disable(name)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with patch.object(tqdm.tqdm, "__init__", hidden):
            yield
    finally:
        for name in LIBRARIES:
            logger.enable(name)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _import_silently() -> None:
    """llm-compressor configures its logger when it is first imported, and warns at once; afterwards it logs as it
    always does."""
    if "llmcompressor" in sys.modules:
        return
    with patch.dict(os.environ, {LEVEL: "CRITICAL"}):
        from llmcompressor.logger import LoggerConfig, configure_logger
    configure_logger(LoggerConfig())
