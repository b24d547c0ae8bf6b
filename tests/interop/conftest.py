"""A folder of task files with data of their own, as a person would write one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_text

QUESTIONS = [
    {"question": "the of and", "choices": ["to", "in the house"], "answer": 0},
    {"question": "is that for it", "choices": ["was on are", "with", "as be this"], "answer": 2},
    {"question": "have", "choices": ["from one", "had not but"], "answer": 1},
    {"question": "what all were", "choices": ["the", "of"], "answer": 0},
]
DOCUMENTS = [make_text(3, 40), "", "käse ⟫ 山\n" + make_text(4, 300)]

FORMS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "data": "questions.jsonl",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_rolling": {
        "data": "documents.jsonl",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_writing": {
        "data": "questions.jsonl",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_missing": {"data": "not-there.jsonl", "output_type": "loglikelihood"},
}


def write_tasks(folder: Path) -> Path:
    """The folder, its data files named relative to it."""
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS if each))
    for name, form in FORMS.items():
        own = {key: value for key, value in form.items() if key != "data"}
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": form["data"]}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **where, **own}))  # JSON is YAML
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")
