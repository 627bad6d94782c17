import os
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings

collect_ignore_glob = ["golden/*"]  # scripts that made the golden data need what tests do not

settings.register_profile("bitnet", deadline=None, derandomize=True, database=None)
settings.load_profile("bitnet")

# Most of the tests' time is XLA compiling the same small programs again: they are kept between
# tests and runs. One folder a worker, because two writers of one file could tear it.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
COMPILED = Path(tempfile.gettempdir()) / f"bitnet-jax-tests-{os.getuid()}" / _WORKER
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tests of whole jobs, whose arithmetic others check: compiled quickly rather than well. They take
# longest, so they begin first (pytest runs with --no-loadscope-reorder): no core waits at the end.
_JOBS = (
    "test_phase3_jobs", "test_experiments", "test_compress", "test_phase4", "test_cli",
    "test_resume", "test_quality_bench", "test_bench", "test_decoder", "test_train", "test_subnorm",
    "test_gguf", "test_gguf_llamacpp", "test_onnx", "test_calibrate", "test_generate",
    "test_phase3_model", "test_nnx", "test_phase3_torch",
)  # fmt: skip


def _is_job(name: str) -> bool:
    return name.rpartition(".")[2] in _JOBS


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(_JOBS)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def _few_optimisations(request):
    quick = _is_job(getattr(request.module, "__name__", ""))
    if not quick:
        yield
        return
    # JAX would go on running programs of the same shapes that were compiled the other way, and the
    # last digits differ: of a scale, say. Which ones there are depends on what this worker ran.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for what the tests start
    yield
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
