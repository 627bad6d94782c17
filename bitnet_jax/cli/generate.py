"""``generate``: what a model writes, and how fast."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ..errors import BitnetError
from .checks import Json
from .use import Module, Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, printed as it is written, or several at once, printed when they end."""

    model: tyro.conf.Positional[Path]
    """A model folder, ours or Hugging Face's, a .gguf file, or PyTorch weights with --module."""
    prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")
    ] = ()
    """Text to continue; give it several times for several texts."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file of texts to continue, one a line."""
    tokens: int = 100
    """How many tokens to add, at most as many as the model has room for."""
    stop: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
    """End a text at this token of the tokenizer's, ``</s>`` say."""
    temperature: float = 0.7
    """0 for the likeliest token every time."""
    top_k: int = 40
    """Draw among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the drawing."""
    module: Module = None
    """The network the weights are for, as for compress."""
    tokenizer: Tokenizer = None
    """A tokenizer.json, or bytes; by default the one beside the weights."""
    json: Json = None
    """Also write texts and speed to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import compress
        from ..models.decoder import DecoderConfig
        from ..models.generate import Sampling
        from ..models.phase3 import Phase3Config

        try:
            how = Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as e:
            raise BitnetError(f"--{e}") from None
        if self.tokens < 1:
            raise BitnetError(f"--tokens {self.tokens}: must be 1 or more")
        prompts = self._prompts()
        source = compress.load_source(self.model, self.module, self.tokenizer)
        if isinstance(source.config, Phase3Config):
            raise BitnetError(
                f"{self.model}: a Phase 3 network looks both ways, so it cannot continue a text; "
                "`bitnet-jax eval` measures it"
            )
        texts = [(prompt, source.tokenizer.encode(prompt).ids) for prompt in prompts]
        steps = min(compress.room(source, len(ids), self.tokens) for _, ids in texts)
        stop, key = self._stop(source), self.seed
        write = lambda texts: _write(source, texts, steps, key, how, stop, console)
        together = isinstance(source.config, DecoderConfig)  # others have no cache, nor lengths
        runs = [write(texts)] if together else [write([text]) for text in texts]
        texts = [text for run in runs for text in run.texts]
        speed = _speed(runs)
        print(_line(speed), file=sys.stderr)
        return (texts[0] if len(texts) == 1 else {}) | speed | {"texts": texts}

    def _prompts(self) -> list[str]:
        prompts = list(self.prompt)
        if self.prompts is not None:
            try:
                lines = self.prompts.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as e:
                raise BitnetError(f"--prompts {self.prompts}: cannot be read as text ({e})") from e
            prompts += [line for line in lines if line]
        if not prompts:
            raise BitnetError("give a text to continue, --prompt TEXT or --prompts FILE")
        return prompts

    def _stop(self, source: Any) -> int | None:
        if self.stop is None:
            return None
        found = source.tokenizer.token_to_id(self.stop)
        if found is None:
            raise BitnetError(f"--stop {self.stop}: the tokenizer has no such token")
        return found


@dataclasses.dataclass(frozen=True)
class _Run:
    texts: list[dict]  # of each prompt: prompt, text, tokens (how many are new)
    read: int  # tokens of the prompts
    times: list[float]  # when it started, and when each token was there


def _write(
    source, prompts: list[tuple[str, list[int]]], steps, seed, how, stop, console: Console
) -> _Run:
    """Continue texts together; a lone one is printed as it is written."""
    import jax

    from ..models.decoder import Decoder
    from ..models.generate import prepare, ragged, stream

    made = [list(ids) for _, ids in prompts]
    tokens, lengths = ragged(made)
    arguments = (source.model, source.params, tokens, steps)
    rows = {"lengths": lengths if len(made) > 1 else None}
    if isinstance(source.model, Decoder):
        with console.status("compiling", spinner="line"):
            prepare(*arguments, how, **rows)
    decode = source.tokenizer.decode
    show = _printer(decode, *prompts[0]) if len(made) == 1 else lambda made: None
    times = [time.perf_counter()]
    for token in stream(*arguments, jax.random.key(seed), how, stop=stop, **rows):
        for one, new in zip(made, token.tolist()):
            one.append(new)
        times.append(time.perf_counter())
        show(made[0])
    if len(made) == 1:
        print(flush=True)
    texts = []
    for (prompt, ids), all_ids in zip(prompts, made):
        new = all_ids[len(ids) :]
        count = new.index(stop) + 1 if stop in new else len(new)
        text = decode(all_ids[: len(ids) + count])
        texts.append({"prompt": prompt, "text": text, "tokens": count})
        if len(made) > 1:
            print(text, end="\n\n")
    return _Run(texts, sum(len(ids) for _, ids in prompts), times)


def _printer(decode: Callable[[list[int]], str], prompt: str, ids: list[int]):
    """Print the prompt; returns a function that prints what tokens (with its own) add to it."""
    shown = decode(ids)
    print(prompt, end="", flush=True)

    def show(made: list[int]) -> None:
        nonlocal shown
        text = decode(made)
        if not text.endswith("\ufffd"):  # half of a character that takes several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text

    return show


def _speed(runs: list[_Run]) -> dict:
    """Tokens a second: the first token waits for the prompt, the others for one another."""
    per = lambda count, seconds: count / seconds if count and seconds else 0.0
    prefill = sum(run.times[1] - run.times[0] for run in runs)
    decode = sum(run.times[-1] - run.times[1] for run in runs)
    later = sum(text["tokens"] - 1 for run in runs for text in run.texts)
    return {
        "tokens": sum(text["tokens"] for run in runs for text in run.texts),
        "seconds": prefill + decode,
        "prefill_tokens_per_second": per(sum(run.read for run in runs), prefill),
        "tokens_per_second": per(later, decode),
    }


def _line(speed: dict) -> str:
    rate = lambda name: f"{speed[name]:,.0f}" if speed[name] >= 10 else f"{speed[name]:.1f}"
    decode = f", decode {rate('tokens_per_second')} tokens/s" if speed["tokens_per_second"] else ""
    return (
        f"{speed['tokens']} tokens in {speed['seconds']:.1f} s: "
        f"prefill {rate('prefill_tokens_per_second')} tokens/s{decode}"
    )
