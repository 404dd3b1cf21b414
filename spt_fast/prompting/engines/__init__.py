"""Two ways to run one transformer block with prompts: as extra keys and values, or as extra tokens.

Both run one block at a time and do not touch the model around it; `choose_engine` takes one of them.
"""

from spt_fast.prompting.engines.attention import KeysValues
from spt_fast.prompting.engines.cache import KeysValuesCache
from spt_fast.prompting.engines.choice import choose_engine
from spt_fast.prompting.engines.concat import (
    append_prompts,
    concat_blocker,
    concat_extras,
    drop_prompts,
    fit_extras,
)
from spt_fast.prompting.engines.kv import (
    known_blocks,
    kv_blocker,
    kv_extras,
    kv_forward,
    prompt_keys_values,
)

__all__ = [
    "KeysValues",
    "KeysValuesCache",
    "append_prompts",
    "choose_engine",
    "concat_blocker",
    "concat_extras",
    "drop_prompts",
    "fit_extras",
    "known_blocks",
    "kv_blocker",
    "kv_extras",
    "kv_forward",
    "prompt_keys_values",
]
