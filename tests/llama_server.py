"""llama.cpp's server with a model, in a process of its own: ``python llama_server.py PATH LENGTH``.

Prints the server's address and serves until its standard input ends. One thread, keys and values in
float32. Not inside the tests' process, because the package's server can wait for ever as it closes.
"""

import os
import sys


def main(path: str, length: str) -> None:
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path, how.n_ctx, how.n_parallel = path, int(length), 1
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = 1
    how.warmup, how.verbosity, how.fit_params = False, 0, False
    how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(how)
    print(f"listening {server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)  # without the destructor, which is what can wait


if __name__ == "__main__":
    main(*sys.argv[1:])
