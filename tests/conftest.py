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
_COMPILED = Path(tempfile.gettempdir()) / f"bitnet-jax-tests-{os.getuid()}" / _WORKER
jax.config.update("jax_compilation_cache_dir", str(_COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tests of whole jobs, whose arithmetic others check: compiled quickly rather than well.
_JOBS = (
    "test_cli", "test_compress", "test_phase3_jobs", "test_phase4", "test_quality_bench",
    "test_resume", "test_train", "test_decoder", "test_subnorm", "test_relation",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _few_optimisations(request):
    quick = request.module.__name__.rpartition(".")[2] in _JOBS
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
