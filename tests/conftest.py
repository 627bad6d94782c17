import os
import tempfile
from pathlib import Path

import jax
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
