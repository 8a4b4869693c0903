"""The engine that every machine has: transformers' own ``generate``, one request per thread.

The only file of :mod:`serving` that imports torch.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from serving.engine import Delta, FinishReason, Refused, Sampling
from serving.text import Detokenizer, StopScanner

# Tokens of the prompt the detokeniser looks back on: enough to settle a leading space or a split character.
_LOOK_BACK = 5
# Logits divided by less than this overflow, and the best two tokens would tie at infinity.
_GREEDY_BELOW = 1e-5


class TransformersEngine:
    """A causal language model from a local Hugging Face directory, on the GPU if this process sees one.

    Only safetensors are read and no code from the directory is run. See :class:`serving.engine.Engine`.
    """

    def __init__(self, model_dir: Path | str, dtype: str = "auto", threads: int = 1) -> None:
        """Load and warm up.

        Args:
            model_dir: written by ``save_pretrained``, model and tokenizer.
            dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
            threads: torch threads of this process; more than the process has CPUs makes them spin on each other.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        self._model.eval().to(self._device)
        text_config = self._model.config.get_text_config()
        self.context: int = text_config.max_position_embeddings
        self._vocabulary: int = text_config.vocab_size
        self._eos = _end_tokens(self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        # The request alone decides how to sample: no penalty or temperature comes in by the model's own defaults.
        self._model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._eos) or None,
            pad_token_id=min(self._eos, default=0),  # one sequence per call: never read, but its absence is a warning
            use_cache=True,
        )
        for _ in self.generate(self.encode("warm-up"), Sampling(max_tokens=2, temperature=0), threading.Event()):
            pass

    def encode(self, prompt: str) -> list[int]:
        """See :meth:`serving.engine.Engine.encode`."""
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        if ids:
            return ids
        if self._tokenizer.bos_token_id is None:
            raise Refused("The prompt is empty and this model has no token to begin a text with.", param="prompt")
        return [self._tokenizer.bos_token_id]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See :meth:`serving.engine.Engine.encode_chat`."""
        if not self._tokenizer.chat_template:
            raise Refused("This model has no chat template; use /v1/completions.", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise Refused(f"This model's chat template does not take the messages: {error}.", "messages") from error
        # The template writes its own special tokens.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """See :meth:`serving.engine.Engine.check_tokens`."""
        outside = [token for token in token_ids if not 0 <= token < self._vocabulary]
        if outside:
            raise Refused(f"Token id {outside[0]} is outside this model's 0 to {self._vocabulary - 1}.", "prompt")

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, gone: threading.Event) -> Iterator[Delta]:
        """See :meth:`serving.engine.Engine.generate`."""
        halt = _Halt(gone)
        tokens = _TokenQueue()
        thread = threading.Thread(target=self._run, args=(prompt_ids, sampling, halt, tokens), daemon=True)
        thread.start()
        text = Detokenizer(self._decode, prompt_ids[-_LOOK_BACK:])
        stops = StopScanner(sampling.stop)
        count = 0
        reason: FinishReason = "length"
        try:
            for token in tokens:
                count += 1
                if token in self._eos:
                    reason = "stop"
                    break
                piece, stopped = stops.feed(text.feed(token))
                if stopped:
                    yield Delta(piece, count, "stop")
                    return
                if piece:
                    yield Delta(piece, count)
            if gone.is_set():
                return
            piece, stopped = stops.feed(text.flush())
            yield Delta(piece if stopped else piece + stops.flush(), count, "stop" if stopped else reason)
        finally:
            halt.now = True
            thread.join()

    @torch.inference_mode()
    def _run(self, prompt_ids: Sequence[int], sampling: Sampling, halt: "_Halt", tokens: "_TokenQueue") -> None:
        try:
            prompt = torch.tensor([prompt_ids], device=self._device)
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=sampling.max_tokens,
                do_sample=False,  # sampling is the Gumbel step in _processors
                logits_processor=self._processors(sampling),
                stopping_criteria=StoppingCriteriaList([halt]),
                streamer=tokens,
            )
        except Exception as error:
            tokens.fail(error)

    def _processors(self, sampling: Sampling) -> LogitsProcessorList:
        if sampling.temperature < _GREEDY_BELOW:
            return LogitsProcessorList()
        generator = torch.Generator(self._device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        steps = [TemperatureLogitsWarper(float(sampling.temperature)), _GumbelNoise(generator)]
        if sampling.top_p < 1:
            steps.insert(1, TopPLogitsWarper(sampling.top_p))
        return LogitsProcessorList(steps)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _GumbelNoise(LogitsProcessor):
    """Makes the argmax of the logits a draw from their softmax (the Gumbel-max trick; Gumbel 1954).

    transformers samples from torch's global generator, which concurrent requests would share: a seed would mean
    nothing. This draws from the request's own.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        # Exp(1) may round to 0, whose -log would beat even a token that top_p took out.
        return scores - noise.clamp_min_(torch.finfo(scores.dtype).tiny).log_()


class _Halt(StoppingCriteria):
    """Ends a generation when its reader has enough (``now``) or its client went away (``gone``)."""

    def __init__(self, gone: threading.Event) -> None:
        self._gone = gone
        self.now = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.now or self._gone.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """The generated tokens, as an iterator in another thread.

    Not transformers' TextIteratorStreamer: that holds text back to the next space (so the first token's time is
    that of the first word) and counts no tokens.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._items.put(int(value.item()))
        self._prompt_seen = True  # generate() hands over the prompt first

    def end(self) -> None:
        self._items.put(None)

    def fail(self, error: Exception) -> None:
        self._items.put(error)

    def __iter__(self) -> Iterator[int]:
        while (item := self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


def _end_tokens(of_model: int | list[int] | None, of_tokenizer: int | None) -> frozenset[int]:
    """A chat model's generation config lists several ends; a bare one has only its tokenizer's."""
    tokens = of_model if of_model is not None else of_tokenizer
    return frozenset(tokens if isinstance(tokens, list) else [] if tokens is None else [tokens])
