import functools
import gc
import os
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jax._src import compiler

collect_ignore_glob = ["tests/golden/*"]  # scripts that made the golden data need what tests do not

settings.register_profile("bitnet", deadline=None, derandomize=True, database=None)
settings.load_profile("bitnet")

# Most of the tests' time is XLA compiling the same small programs again: they are kept between
# tests and runs. One folder a worker, because two writers of one file could tear it.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
COMPILED = Path(tempfile.gettempdir()) / f"bitnet-jax-tests-{os.getuid()}" / _WORKER
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing makes many small objects that stay: looking through them every 700 takes a tenth of a job.
gc.set_threshold(50_000, 20, 20)

# Tests of jobs, training, layers and files, whose arithmetic others check: compiled quickly rather
# than well, as the examples in docstrings are. The longest begin first (pytest runs with
# --no-loadscope-reorder): no core waits at the end.
_JOBS = (
    "test_phase3_jobs", "test_experiments", "test_compress", "test_phase4", "test_cli",
    "test_resume", "test_quality_bench", "test_bench", "test_decoder", "test_train", "test_subnorm",
    "test_gguf", "test_gguf_llamacpp", "test_onnx", "test_calibrate", "test_generate",
    "test_phase3_model", "test_nnx", "test_phase3_torch", "test_optim", "test_relation",
    "test_sandbox", "test_optim_muon", "test_reconstruct", "test_recipe", "test_torch",
    "test_optim_qk_clip", "test_plan", "test_text", "test_optim_presets",
    "test_grokking", "test_checkpoint", "test_readme", "test_hf_live", "test_conv", "test_linen",
    "test_sparse", "test_attention", "test_distill", "test_shrink", "test_leaf",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(_JOBS)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# These compare two forms of one network or formula to the last digits, and XLA's older emitters
# give the two different ones.
_LAST_DIGITS = ("test_phase3_model", "test_nnx", "test_relation", "test_torch")

# Half of what compiling a small program takes is XLA's emitters of fusions through MLIR; the older
# ones do without. An XLA that has none of them any more is left as it is.
_OLD_EMITTERS = {"xla_cpu_use_fusion_emitters": False}


@functools.cache
def _has_old_emitters() -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=_OLD_EMITTERS)(0)
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


_compile_options = compiler.get_compile_options


def _with_old_emitters(*args, env_options_overrides=None, **more):
    options = {**_OLD_EMITTERS, **(env_options_overrides or {})}
    return _compile_options(*args, env_options_overrides=options, **more)


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request):
    name = request.path.stem
    is_example = not name.startswith("test_")
    if name not in _JOBS and not is_example:
        yield
        return
    # JAX would go on running programs of the same shapes that were compiled the other way, and the
    # last digits differ: of a scale, say. Which ones there are depends on what this worker ran.
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for what the tests start
        if name not in _LAST_DIGITS and _has_old_emitters():
            flags = os.environ.get("XLA_FLAGS", "")
            patch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_use_fusion_emitters=false")
            patch.setattr(compiler, "get_compile_options", _with_old_emitters)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
