"""``eval`` and ``generate``: what a model knows, and what it writes."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from ..errors import BitnetError
from .checks import Json

Module = Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")]
Tokenizer = Annotated[str | None, tyro.conf.arg(metavar="FILE")]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Loss, accuracy and perplexity of a model on text, and its agreement with another model."""

    model: tyro.conf.Positional[Path]
    """A model folder, ours or Hugging Face's, a .gguf file, or PyTorch weights with --module."""
    data: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Text: a file or a folder. Measured is the tenth that compress holds out."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None
    """Another model with the same tokens to agree with, the float one say."""
    module: Module = None
    """The network the weights are for, as for compress."""
    tokenizer: Tokenizer = None
    """A tokenizer.json, or bytes; by default the one beside the weights."""
    batch: int = 16
    """Windows measured at once."""
    length: int = 128
    """Tokens a window."""
    json: Json = None
    """Also write the figures to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import compress
        from ..objective import evaluator
        from ..train.agreement import agreement

        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise BitnetError(f"--{name} {getattr(self, name)}: must be 1 or more")
        with console.status("measuring", spinner="line"):
            source = compress.load_source(self.model, self.module, self.tokenizer)
            text = compress.load_text(self.data, source, self.length).held_out
            evaluate = evaluator(source)
            result: dict = {"model": str(self.model)}
            result |= evaluate(source.model, source.params, text, self.batch)
            if self.against is not None:
                other = compress.load_source(self.against, self.module, self.tokenizer)
                compress.check_tokens(self.against, other, text)
                result["against"] = {"model": str(self.against)} | {
                    **evaluate(other.model, other.params, text, self.batch),
                    **agreement(
                        source.model, source.params, other.model, other.params, text, self.batch
                    ),
                }
        console.print(_table(result))
        return result


def _table(result: dict) -> Table:
    table = Table(title=f"{result['tokens']:,} held-out tokens", title_justify="left")
    table.add_column("model")
    names = ["loss (nats)", "perplexity", "accuracy"]
    rows = [result] + ([result["against"]] if "against" in result else [])
    for name in names + (["same token", "KL (nats)"] if len(rows) > 1 else []):
        table.add_column(name, justify="right")
    other = result.get("against", {})
    for row in rows:
        cells = [f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{100 * row['accuracy']:.2f} %"]
        if row is result and other:
            cells += [f"{100 * other['top1']:.2f} %", f"{other['kl']:.4f}"]
        table.add_row(row["model"], *cells)
    return table


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, printed as it is written."""

    model: tyro.conf.Positional[Path]
    """A model folder, ours or Hugging Face's, a .gguf file, or PyTorch weights with --module."""
    prompt: str
    """Text to continue."""
    tokens: int = 100
    """How many tokens to add, at most as many as the model has room for."""
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
    """Also write prompt, text and speed to this file."""

    def __call__(self, console: Console) -> dict:
        import jax
        import jax.numpy as jnp

        from .. import compress
        from ..models.generate import Sampling, stream
        from ..models.phase3 import Phase3Config

        try:
            how = Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as e:
            raise BitnetError(f"--{e}") from None
        if self.tokens < 1:
            raise BitnetError(f"--tokens {self.tokens}: must be 1 or more")
        source = compress.load_source(self.model, self.module, self.tokenizer)
        ids = source.tokenizer.encode(self.prompt).ids
        if isinstance(source.config, Phase3Config):
            raise BitnetError(
                f"{self.model}: a Phase 3 network looks both ways, so it cannot continue a text; "
                "`bitnet-jax eval` measures it"
            )
        steps = compress.room(source, len(ids), self.tokens)
        tokens, key = jnp.asarray([ids], jnp.int32), jax.random.key(self.seed)
        print(self.prompt, end="", flush=True)
        made, shown, times = list(ids), source.tokenizer.decode(ids), [time.perf_counter()]
        for token in stream(source.model, source.params, tokens, steps, key, how):
            made.append(int(token[0]))
            times.append(time.perf_counter())
            text = source.tokenizer.decode(made)
            if not text.endswith("\ufffd"):  # half of a character that takes several tokens
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print(flush=True)
        # The first token waits for the compiler and for the prompt.
        speed = (steps - 1) / (times[-1] - times[1]) if steps > 1 else 0.0
        print(f"{steps} tokens, {speed:.1f} a second", file=sys.stderr)
        text = source.tokenizer.decode(made)
        return {"prompt": self.prompt, "text": text, "tokens": steps, "tokens_per_second": speed}
