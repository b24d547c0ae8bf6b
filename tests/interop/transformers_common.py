"""transformers' own common tests of models, and of generation, on LamdaModel and LamdaForCausalLM.

They are run from a checkout of its repository at the installed version, nothing of which is kept here:

    TRANSFORMERS_CHECKOUT=.../transformers make transformers-test

It takes the package parameterized. What a checkout lacks (the source distribution on the package index has the tests of
models alone) is left out: of generation a skipped test says so. docs/huggingface.md says what passes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from lamda.interop.huggingface import LamdaConfig, LamdaForCausalLM, LamdaModel

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
if CHECKOUT is None:
    pytest.skip("TRANSFORMERS_CHECKOUT is not set", allow_module_level=True)
pytest.importorskip("parameterized")

MIXINS = {
    "test_modeling_common": "ModelTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
    "exporters.test_export": "ExportTesterMixin",
}
PACKAGE = "transformers_tests"


def mixins_of(checkout: Path) -> tuple[dict[str, type], list[str]]:
    """The mixins by name, an empty one for each file that the checkout lacks, and the names of those files."""
    message = (checkout / "src/transformers/__init__.py").read_text("utf-8")
    if f'__version__ = "{transformers.__version__}"' not in message:
        pytest.fail(f"{checkout} is not transformers {transformers.__version__}, which is installed", pytrace=False)
    package = ModuleType(PACKAGE)
    package.__path__ = [str(checkout / "tests")]
    sys.modules[PACKAGE] = package
    missing = [name for name in MIXINS if not (checkout / "tests" / f"{name.replace('.', '/')}.py").is_file()]
    for name in missing:
        module = ModuleType(f"{PACKAGE}.{name}")
        setattr(module, MIXINS[name], type(MIXINS[name], (), {}))
        sys.modules[f"{PACKAGE}.{name}"] = module
        parent = ModuleType(f"{PACKAGE}.{name.partition('.')[0]}")
        parent.__path__ = [str(checkout / "tests" / name.partition(".")[0])]
        sys.modules.setdefault(parent.__name__, parent)
    found = {mixin: getattr(importlib.import_module(f"{PACKAGE}.{name}"), mixin) for name, mixin in MIXINS.items()}
    return found, missing


FOUND, MISSING = mixins_of(Path(CHECKOUT))
ids_tensor = importlib.import_module(f"{PACKAGE}.test_modeling_common").ids_tensor
torch_device = importlib.import_module("transformers.testing_utils").torch_device
# Their tests look up what a class is for in the tables of the library's own models.
modeling_auto.MODEL_MAPPING_NAMES[LamdaConfig.model_type] = LamdaModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LamdaConfig.model_type] = LamdaForCausalLM.__name__


class LamdaTester:
    """A tiny model and its inputs, in the form that the mixins ask for."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 99, 32, 2, 4, 37
    key_length = encoder_seq_length = seq_length
    base_model_class, causal_lm_class = LamdaModel, LamdaForCausalLM

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> LamdaConfig:
        return LamdaConfig(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            d_head=8,
            d_ff=self.intermediate_size,
            max_position_embeddings=128,
            bias_per_layer=self.parent.bias_per_layer,
        )

    def prepare_config_and_inputs_for_common(self):
        ids_BL = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask_BL = torch.tril(ids_BL.new_ones(ids_BL.shape)).to(torch_device)
        return self.get_config(), {"input_ids": ids_BL, "attention_mask": mask_BL}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class CommonTests(FOUND["ModelTesterMixin"], FOUND["GenerationTesterMixin"]):
    all_model_classes = (LamdaModel, LamdaForCausalLM)
    pipeline_model_mapping = {"feature-extraction": LamdaModel, "text-generation": LamdaForCausalLM}  # noqa: RUF012

    def setUp(self) -> None:
        self.model_tester = LamdaTester(self)

    @pytest.mark.skipif("generation.test_utils" not in MISSING, reason="the checkout has the tests of generation")
    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("the checkout has no tests/generation/test_utils.py")


class LamdaWithATableALayerTest(CommonTests, unittest.TestCase):
    bias_per_layer = True


class LamdaWithASharedTableTest(CommonTests, unittest.TestCase):
    bias_per_layer = False
