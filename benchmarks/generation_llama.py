"""llama.cpp as a peer of generation.py: the same shape as GGUF, and a worker that times it.

    python generation_llama.py MODEL.gguf THREADS     # answers "prompt new" lines with JSON

It runs under whatever Python has ``xllamacpp``; nothing of this library is imported.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

MATRICES = {
    "attn_q": ("width", "width"), "attn_k": ("width", "width"), "attn_v": ("width", "width"),
    "attn_output": ("width", "width"), "ffn_gate": ("width", "hidden"),
    "ffn_up": ("width", "hidden"), "ffn_down": ("hidden", "width"),
}  # fmt: skip


def write_model(path: Path, shape: dict, kind: str) -> None:
    """A Llama of that shape with random ternary matrices, table and head tied in Q8_0.

    Args:
      shape: vocab_size, width, layers, heads, hidden, max_length.
      kind: of the matrices, a name of gguf's: ``"TQ2_0"`` or ``"Q4_0"``.
    """
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random ternary {kind}")
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(shape["max_length"])
    writer.add_embedding_length(shape["width"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["hidden"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["heads"])
    writer.add_rope_dimension_count(shape["width"] // shape["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, shape["vocab_size"])

    def add(name: str, values: np.ndarray, kind: str | None) -> None:
        if kind is None:
            writer.add_tensor(name, values)
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)

    table = random.standard_normal((shape["vocab_size"], shape["width"]), np.float32) * 0.02
    add("token_embd.weight", table, "Q8_0")
    norm = np.ones(shape["width"], np.float32)
    add("output_norm.weight", norm, None)
    for i in range(shape["layers"]):
        add(f"blk.{i}.attn_norm.weight", norm, None)
        add(f"blk.{i}.ffn_norm.weight", norm, None)
        for name, (k, n) in MATRICES.items():
            size = (shape[n], shape[k])
            codes = random.integers(-1, 2, size, np.int8).astype(np.float32)
            add(f"blk.{i}.{name}.weight", codes * (1.5 / shape[k]) ** 0.5, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer, size: int) -> None:
    """Tokens that no text is made of: prompts are given as ids."""
    import gguf

    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    more = size - len(names)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names + [f"token{i}" for i in range(more)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * more)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def serve(model: str, threads: int) -> None:
    """Answer each line "prompt new" on stdin: read so many tokens, then make so many."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    out = os.fdopen(os.dup(1), "w")  # what llama.cpp says on stdout is not for the reader
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 512
    params.n_batch = params.n_ubatch = 512
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port = 0
    server = xllamacpp.Server(params)
    print(json.dumps({"ready": xllamacpp.get_system_info()}), file=out, flush=True)
    for turn, line in enumerate(sys.stdin):
        prompt, new = map(int, line.split())
        ask = {
            "prompt": [(turn * 997 + i * 31) % 40000 + 300 for i in range(prompt)],
            "n_predict": new, "cache_prompt": False, "ignore_eos": True, "temperature": 0.0,
            "top_k": 1,
        }  # fmt: skip
        start, cpu = time.perf_counter(), time.process_time()
        answer = server.handle_completions(ask)
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        timings = (answer if isinstance(answer, dict) else json.loads(answer)).get("timings")
        print(json.dumps({"timings": timings, **seconds}), file=out, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
