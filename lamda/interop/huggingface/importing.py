"""`lamda import`: convert a Hugging Face folder for `model.weights` and `lamda generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lamda.config import Config, ModelConfig
from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.dialog.calibration import CALIBRATION, Calibration
from lamda.durable import read_regular
from lamda.interop.huggingface.configuration import LamdaConfig
from lamda.interop.huggingface.folders import new_folder
from lamda.interop.huggingface.tokenization import check_vocabulary
from lamda.interop.huggingface.weights import StoredWeights, write_shards
from lamda.model.weights import weight_shapes
from lamda.storage import manifest

_WHOLE = "1000000GB"


def import_folder(path: Path, to: Path) -> None:
    """Write the model in the folder `path` to the new folder `to`: model.safetensors, config.yaml, tokenizer.model.

    Weights are unchanged, byte for byte, and a calibration comes along (calibration.json). Raises UserError if the
    folder is not LaMDA's, incomplete or damaged.
    """
    if (path / manifest.MANIFEST).is_file() and (problem := manifest.problem_of(path)):
        raise UserError(
            f"{path}: {problem}; export or download it again, or, if you changed it, delete {manifest.MANIFEST}"
        )
    model, data = _configuration(path / "config.json")
    calibration = Calibration.read(path)
    stored = StoredWeights(path, model)
    tokenizer = path / "tokenizer.model"
    check_vocabulary(tokenizer, model)
    values = {
        "model": model.dimensions,
        "data": data,
        # The configuration requires a length, though nothing is trained with it.
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    with new_folder(to, {"source": None, "step": None}) as folder:
        write_shards(folder, weight_shapes(model), stored.read, dtype=stored.dtype, max_shard_size=_WHOLE)
        (folder / "config.yaml").write_text(to_yaml(Config.model_validate(values)), "utf-8")
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        if calibration is not None:
            (folder / CALIBRATION).write_text(calibration.model_dump_json(indent=1), "utf-8")


def _configuration(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The dimensions and the `data` section of a config.json. Raises UserError that lists every problem."""
    try:
        values: dict[str, Any] = json.loads(read_regular(path))
        kind = values.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a folder that `lamda export` wrote") from error
    if kind != LamdaConfig.model_type:
        raise UserError(f"{path}: model_type is {kind!r}; only folders of {LamdaConfig.model_type!r} can be imported")
    wanted = [*ModelConfig().dimensions, "max_position_embeddings"]
    problems = [f"has no {key}" for key in wanted if key not in values]
    if values.get("tie_word_embeddings") is not True:
        problems.append("tie_word_embeddings is not true: LaMDA's output projection is its embedding")
    if not problems:
        try:
            # Chat and server tell dialogue models by their packing.
            packing = {"packing": "whole"} if values.get("is_dialogue_model") is True else {}
            data = {"sequence_length": values["max_position_embeddings"], **packing}
            Config.model_validate({"train": {"steps": 1}, "data": data})
            return ModelConfig.model_validate({key: values[key] for key in ModelConfig().dimensions}), data
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
