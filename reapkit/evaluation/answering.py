"""Lets a model answer prompts, a batch at a time: in this process, or on a server that speaks OpenAI's protocol."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import httpx

from reapkit.core.errors import StageFailed, UnusableError

TRIES = 3
"""How often a server is asked before it counts as gone."""
PAUSE_SECONDS = 1.0
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 1800.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which asking again may help."""
LONGEST_BODY = 300
HERE = "transformers"
"""Who answers in this process."""


@dataclass(frozen=True)
class Sampling:
    """How answers are written: greedily at temperature 0, else sampled from the `top_p` of the probability; and the
    tokens after which an answer is cut off."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, number: int) -> int:
        """A seed of its own for each batch or prompt, so that a run that goes on draws what it would have drawn."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:4], "little") >> 1


@dataclass(frozen=True)
class Answer:
    """What a model wrote, without the end token, whether it ended by itself, and who wrote it."""

    text: str
    ended: bool
    by: str


Answering = Callable[[Sequence[Sequence[int]], int], list[Answer]]
"""From a batch of prompts, as token ids, and the number of the first of them, to their answers."""


def in_process(model: Any, tokenizer: Any, sampling: Sampling) -> Answering:
    """Answers by the model's own `generate`."""
    import torch

    from reapkit.evaluation.generation import continued, how
    from reapkit.evaluation.linear import fast_linear

    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = how(model, sampling.max_new_tokens, **(sampled if sampling.temperature else {"do_sample": False}))

    def answer(prompts: Sequence[Sequence[int]], first: int) -> list[Answer]:
        with torch.random.fork_rng(), fast_linear(model):
            torch.manual_seed(sampling.seed_of(first))
            written = continued(model, prompts, config)
        return [Answer(tokenizer.decode(list(each.tokens)), each.finished, HERE) for each in written]

    return answer


class Server:
    """A running server with `/v1/models` and `/v1/completions`, such as vLLM's. It gets token ids, so that the prompts
    are the same as in this process, and keeps special tokens in its answers: calls and thoughts are written with them.
    """

    def __init__(self, url: str, sampling: Sampling, ends: Sequence[str], model: str | None = None):
        """`ends`: end tokens as text, which some servers leave at the end. Raises UnusableError where the server does
        not answer, or does not serve `model` (default: the first that it serves)."""
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.sampling, self.ends = sampling, tuple(end for end in ends if end)
        try:
            self._client = httpx.Client(timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS))
            response = self._client.get(f"{self.url}/models")
            response.raise_for_status()
            served = [str(each["id"]) for each in response.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UnusableError(
                f"--server {url}: {self.url}/models does not answer as OpenAI's protocol says ({_told(error)})."
                " Start the server, or correct the address."
            ) from None
        if not served or (model is not None and model not in served):
            raise UnusableError(
                f"--server {url}: it serves {', '.join(served) or 'no model'}"
                + (f", not '{model}'. Choose one of these with --model." if model else ". Start it with a model.")
            )
        self.model = model or served[0]

    def __call__(self, prompts: Sequence[Sequence[int]], first: int) -> list[Answer]:
        """Answers of a batch, all asked at once. Raises StageFailed where the server stops answering, UnusableError
        where it refuses a prompt."""
        threads = ThreadPoolExecutor(len(prompts))
        try:
            waiting = [threads.submit(self._answer, list(ids), first + i) for i, ids in enumerate(prompts)]
            done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()  # raises what stopped the wait
            return [each.result() for each in waiting]
        finally:  # after an error or Ctrl-C nobody waits for the others' answers, which may take minutes
            threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self._client.close()

    def _answer(self, ids: list[int], number: int) -> Answer:
        choice = self._asked(
            {
                "model": self.model,
                "prompt": ids,
                "max_tokens": self.sampling.max_new_tokens,
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "seed": self.sampling.seed_of(number),
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            }
        )
        text = str(choice.get("text") or "")
        if end := next((end for end in self.ends if text.endswith(end)), None):
            text = text.removesuffix(end)
        return Answer(text, choice.get("finish_reason") == "stop", self.model)

    def _asked(self, body: dict[str, Any]) -> dict[str, Any]:
        told = ""
        for attempt in range(TRIES):
            try:
                response = self._client.post(f"{self.url}/completions", json=body)
                if response.status_code not in BUSY:
                    return self._choice(response)
                told = f"status {response.status_code}: {response.text[:LONGEST_BODY]}"
            except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed
                told = _told(error)
                if self._client.is_closed:
                    break
            if attempt + 1 < TRIES:
                time.sleep(PAUSE_SECONDS)
        raise StageFailed(
            f"--server {self.url}: it stopped answering ({told}). Start it again, then run the same command again: it"
            " goes on where it stopped."
        )

    def _choice(self, response: httpx.Response) -> dict[str, Any]:
        try:
            if response.status_code == httpx.codes.OK and isinstance(found := response.json()["choices"][0], dict):
                return found
        except (ValueError, KeyError, IndexError, TypeError):
            pass
        raise UnusableError(
            f"--server {self.url}: /completions answered with status {response.status_code}:"
            f" {response.text[:LONGEST_BODY]}. It must take token ids as prompt, as vLLM and SGLang do."
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": .")
