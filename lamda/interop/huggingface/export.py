"""`lamda export`: write a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lamda.config.errors import UserError
from lamda.data.tokenizer import CONTROL_SYMBOLS
from lamda.dialog.calibration import CALIBRATION, Calibration
from lamda.inference.loading import deleted, find_checkpoint
from lamda.inference.sampling import Sampling
from lamda.interop.huggingface import LamdaConfig, LamdaForCausalLM
from lamda.interop.huggingface.card import model_card
from lamda.interop.huggingface.folders import new_folder
from lamda.interop.huggingface.source import ExportSource
from lamda.interop.huggingface.tokenization import check_vocabulary, save_tokenizer
from lamda.interop.huggingface.weights import StoredWeights, master_weights, write_shards
from lamda.model.weights import weight_shapes


def export(path: Path, to: Path, *, dtype: str | None = None, max_shard_size: str = "5GB") -> str:
    """Write the checkpoint at `path`, or the newest of the run there, to the new folder `to`.

    dtype: a name of DTYPES; float32 takes the optimizer's master weights. Default: as stored. Returns it.
    Raises UserError if something is missing or damaged, or the folder exists.
    """
    source = ExportSource.of(find_checkpoint(path))
    stored = StoredWeights(source.path, source.config.model)
    dtype = dtype or stored.dtype
    takes_masters = dtype == "float32" and stored.dtype != dtype
    read = master_weights(source.path, source.config) if takes_masters else stored.read
    check_vocabulary(source.path / "tokenizer.model", source.config.model)
    try:
        with new_folder(to, {"source": source.manifest.get("sha256"), "step": source.manifest.get("step")}) as folder:
            write_shards(folder, weight_shapes(source.config.model), read, dtype=dtype, max_shard_size=max_shard_size)
            save_tokenizer(source.path / "tokenizer.model", folder)
            dimensions: dict[str, Any] = source.config.model.dimensions
            LamdaConfig(
                **dimensions,
                max_position_embeddings=source.config.data.sequence_length,
                is_dialogue_model=source.config.data.packing == "whole",
                architectures=[LamdaForCausalLM.__name__],
                dtype=dtype,
            ).save_pretrained(folder)
            _generation().save_pretrained(folder)
            if calibration := Calibration.read(source.path):
                (folder / CALIBRATION).write_text(calibration.model_dump_json(indent=1), "utf-8")
            (folder / "README.md").write_text(model_card(source, folder, dtype=dtype, masters=takes_masters), "utf-8")
    except UserError as error:
        if gone := deleted(source.path):
            raise UserError(f"{source.path}: cannot be read{gone}") from error
        raise
    return dtype


def _generation() -> GenerationConfig:
    """The sampling of `lamda generate`: top-k of 40, until any control symbol."""
    default = Sampling()
    return GenerationConfig(
        do_sample=True,
        temperature=default.temperature,
        top_k=default.top_k,
        top_p=default.top_p,
        bos_token_id=CONTROL_SYMBOLS.index("end_of_document"),
        eos_token_id=[*range(len(CONTROL_SYMBOLS))],
        pad_token_id=CONTROL_SYMBOLS.index("padding"),
    )
