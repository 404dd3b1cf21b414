"""Two ways to run one transformer block with prompts: as extra keys and values, or as extra tokens.

Neither touches the model around the block; `choose_engine` takes one of them.
"""

from spt_fast.prompting.engines.attention import (
    KeysValues,
    attend,
    attention_weights,
    cross_attend,
    cross_weights,
)
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
    kv_attentions,
    kv_blocker,
    kv_extras,
    prompt_keys_values,
    unknown_attention,
)

__all__ = [
    "KeysValues",
    "KeysValuesCache",
    "append_prompts",
    "attend",
    "attention_weights",
    "choose_engine",
    "concat_blocker",
    "concat_extras",
    "cross_attend",
    "cross_weights",
    "drop_prompts",
    "fit_extras",
    "known_blocks",
    "kv_attentions",
    "kv_blocker",
    "kv_extras",
    "prompt_keys_values",
    "unknown_attention",
]
