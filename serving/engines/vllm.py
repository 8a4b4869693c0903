"""vLLM's own engine (``AsyncLLM``) in this process, for GPUs.

vLLM is not among our requirements, as it pins a torch of its own. Tried with vLLM 0.32.
"""

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import RunError, UserError
from serving.engines.answer import Answer, Chances
from serving.engines.base import MAX_LOGPROBS, Delta, Load, Sampling, UnsupportedError
from serving.engines.mailbox import Mailbox
from serving.engines.tokens import Tokenizer, end_tokens

# Nobody is told that this machine runs a model, and nothing is fetched: the directory has everything.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# As in the transformers engine: below this is greedy.
_GREEDY_BELOW = 1e-5


class VllmEngine:
    """A causal language model from a local Hugging Face directory under vLLM's continuous batching.

    vLLM gives tokens; text, stop strings and log-probabilities are made of them by the same code as in the other
    engines. Its event loop is a thread's own, so that readers may be in any loop.

    vLLM does not promise that a text is the same alone and in a batch (see its VLLM_BATCH_INVARIANT).

    See :class:`serving.engines.base.Engine`.
    """

    def __init__(
        self, model_dir: Path | str, dtype: str = "auto", threads: int = 1, slots: int = 8, **more: Any
    ) -> None:
        """Load and warm up.

        Args:
            model_dir: written by ``save_pretrained``, model and tokenizer.
            dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
            threads: threads that compute, where it runs on a CPU.
            slots: the most requests that share a forward pass; more wait.
            more: what else ``vllm.AsyncEngineArgs`` takes, like ``gpu_memory_utilization``.

        Raises:
            UserError: vLLM is not installed.
        """
        for name, value in {**_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}.items():
            os.environ.setdefault(name, value)
        vllm = _vllm()
        arguments = {
            "model": str(model_dir),
            "dtype": dtype,
            "max_num_seqs": slots,
            "max_logprobs": MAX_LOGPROBS,
            "load_format": "safetensors",
            "generation_config": "vllm",  # the request alone decides how to sample
            "trust_remote_code": False,
            "disable_log_stats": True,
            "enforce_eager": not _on_gpu(),  # compiling for a CPU takes minutes
            **more,
        }
        self._parameters = vllm.SamplingParams
        self._deltas_only = vllm.sampling_params.RequestOutputKind.DELTA
        self._slots = slots
        self._here = 0
        self._readers: set[Mailbox] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._inner = self._call(_open(vllm, arguments))
            self.context: int = self._inner.model_config.max_model_len
            self._tokenizer = Tokenizer(model_dir, self._inner.model_config.get_vocab_size())
            self._ends = end_tokens(_ends_of(model_dir), self._tokenizer.end)
            self._call(self._warm_up())
        except BaseException:
            self._stop()
            raise

    @property
    def load(self) -> Load:
        """See :class:`serving.engines.base.Engine`. vLLM does not say who waits: who is more than the slots does."""
        running = min(self._here, self._slots)
        return Load(self._here - running, running)

    def encode(self, prompt: str) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode`."""
        return self._tokenizer.encode(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode_chat`."""
        return self._tokenizer.encode_chat(messages)

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """See :meth:`serving.engines.base.Engine.check_tokens`."""
        self._tokenizer.check(token_ids)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """See :meth:`serving.engines.base.Engine.generate`."""
        if self._closed:
            raise RunError("the engine runs no more: it was closed.")
        mailbox = Mailbox()
        self._readers.add(mailbox)
        pumping = asyncio.run_coroutine_threadsafe(self._pump(prompt_ids, sampling, mailbox), self._loop)
        try:
            async for delta in mailbox.read():
                yield delta
        finally:
            self._readers.discard(mailbox)
            pumping.cancel()  # vLLM aborts a request whose reader is cancelled

    def score(self, token_ids: Sequence[int], ids_TK: np.ndarray) -> np.ndarray:
        """Cannot. See :meth:`serving.engines.base.Engine.score`.

        vLLM tells the log-probabilities of a prompt's most likely tokens, not of given ones on every device.
        """
        raise UnsupportedError("the vllm engine cannot score given tokens; use the transformers engine.")

    async def close(self) -> None:
        """See :meth:`serving.engines.base.Engine.close`."""
        await asyncio.to_thread(self._stop)

    async def _pump(self, prompt_ids: Sequence[int], sampling: Sampling, mailbox: Mailbox) -> None:
        """In vLLM's loop: its tokens to deltas, to the reader."""
        self._here += 1
        try:
            async with aclosing(self._deltas(prompt_ids, sampling)) as deltas:
                async for delta in deltas:
                    mailbox.put(delta)
        except Exception as error:
            mailbox.put(error)
        finally:
            self._here -= 1

    async def _deltas(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        answer = Answer(self._tokenizer, self._ends, prompt_ids, sampling)
        outputs = self._inner.generate(
            {"prompt_token_ids": list(prompt_ids)}, self._sampling_params(sampling), uuid.uuid4().hex
        )
        # Closing it before its end, as at a stop string, aborts the request.
        async with aclosing(outputs):
            async for output in outputs:
                made = output.outputs[0]
                for at, token in enumerate(made.token_ids):
                    thought = _chances(made.logprobs[at], token, sampling.logprobs) if made.logprobs else None
                    delta = answer.feed(token, thought)
                    if delta is not None:
                        yield delta
                        if delta.finish_reason is not None:
                            return

    def _sampling_params(self, sampling: Sampling) -> Any:
        greedy = sampling.temperature < _GREEDY_BELOW or sampling.top_p <= 0
        return self._parameters(
            max_tokens=sampling.max_tokens,
            temperature=0.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            stop_token_ids=sorted(self._ends),
            detokenize=False,
            output_kind=self._deltas_only,
        )

    async def _warm_up(self) -> None:
        async for _ in self._deltas(self._tokenizer.encode("warm-up"), Sampling(max_tokens=2, temperature=0)):
            pass

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        if self._closed:
            return
        self._closed = True
        for mailbox in tuple(self._readers):
            mailbox.put(RunError("the engine was closed."))
        if hasattr(self, "_inner"):
            self._call(_shut(self._inner))
            del self._inner  # its __del__ wants modules that are gone when Python ends
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _vllm() -> Any:
    try:
        import vllm
        import vllm.sampling_params
    except ImportError as error:
        raise UserError(
            f"the vllm engine cannot load vLLM ({error}); pip install vllm, or use the transformers engine."
        ) from error
    return vllm


async def _open(vllm: Any, arguments: dict[str, Any]) -> Any:
    """In the loop that it will run in: vLLM starts tasks of its own there."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(vllm.AsyncEngineArgs(**arguments))


async def _shut(engine: Any) -> None:
    engine.shutdown()


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _ends_of(model_dir: Path | str) -> int | list[int] | None:
    from transformers import GenerationConfig

    if not (Path(model_dir) / "generation_config.json").is_file():
        return None
    ends: int | list[int] | None = GenerationConfig.from_pretrained(model_dir, local_files_only=True).eos_token_id
    return ends


def _chances(of_vllm: Mapping[int, Any], token: int, k: int | None) -> Chances | None:
    """``of_vllm`` has the k most likely tokens and the chosen one, which may be one more."""
    if k is None:
        return None
    best = sorted(((other, float(one.logprob)) for other, one in of_vllm.items()), key=lambda pair: -pair[1])
    return Chances(float(of_vllm[token].logprob), best[:k])
