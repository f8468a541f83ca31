"""Parameters of a state at the paths that a checkpoint of an earlier format has them at."""

from typing import Any

import jax

from gigagan_jax.config import parameter_renames

_NETWORKS = {"g": "generator", "g_ema": "generator", "d": "discriminator", "v": "vision_aided"}


def translate_paths(state: Any, number: int, like: Any = None) -> Any:
    """Moves the parameters of a state, or of a dict of its parts, to the paths of a checkpoint's format.

    Args:
      state: at the current paths; with `like`, at the paths of the checkpoint.
      number: of the format.
      like: state at the current paths; the direction is reversed with it.
    """
    # The moments of the optimizer are dicts of the same paths: the same translation applies to them.
    is_params = lambda x: isinstance(x, dict)

    def translate_network(network: str, part: Any, example: Any) -> Any:
        to_stored = lambda x: parameter_renames.to_paths_at_format(network, x, number) if is_params(x) else x
        to_current = lambda x, y: parameter_renames.from_paths_at_format(network, x, y, number) if is_params(x) else x
        if like is None:
            return jax.tree.map(to_stored, part, is_leaf=is_params)
        return jax.tree.map(to_current, part, example, is_leaf=is_params)

    parts = {k: state[k] for k in state} if isinstance(state, dict) else vars(state)
    examples = like if isinstance(like, dict) else {} if like is None else vars(like)
    translated = {
        k: translate_network(_NETWORKS[k], x, examples.get(k))
        for k, x in parts.items()
        if k in _NETWORKS and x is not None
    }
    return state | translated if isinstance(state, dict) else state.replace(**translated)
