"""LaMDA as a model of transformers: importing this package registers it; no remote code is needed.

import lamda.interop.huggingface
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
"""

from __future__ import annotations

from lamda.config.errors import UserError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
except ImportError as error:
    raise UserError(
        f"Hugging Face's formats need transformers 5 ({error}): pip install 'lamda-pytorch[huggingface]'"
    ) from error

from lamda.interop.huggingface.configuration import LamdaConfig
from lamda.interop.huggingface.modeling import LamdaForCausalLM, LamdaModel

__all__ = ["LamdaConfig", "LamdaForCausalLM", "LamdaModel"]

AutoConfig.register(LamdaConfig.model_type, LamdaConfig, exist_ok=True)
AutoModel.register(LamdaConfig, LamdaModel, exist_ok=True)
AutoModelForCausalLM.register(LamdaConfig, LamdaForCausalLM, exist_ok=True)
# Files hold the plain names of weights, from either model.
register_checkpoint_conversion_mapping(
    LamdaForCausalLM.__name__,
    [WeightRenaming(r"^(embedding|layers|final_norm|relative_bias)", r"model.\1")],
    overwrite=True,
)
