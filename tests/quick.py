"""XLA settings that compile fast and run slowly: most tests ask what is computed, and compiling is nearly all of their time."""

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.version.__version_info__ < (
    0,
    11,
):  # later compilers have these emitters only, and stop at a flag they do not know
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
