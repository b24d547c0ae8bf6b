"""Files are found from the working directory first, then among the package's copies."""

from pathlib import Path

import pytest

from lamda.config import resources
from lamda.config.errors import UserError
from lamda.config.resources import card_path, find


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel's package with copies, and an empty working directory beside it."""
    copies = tmp_path / "site-packages" / "lamda" / "_resources"
    (copies / "data").mkdir(parents=True)
    (copies / "data" / "small.yaml").write_text("copy")
    (tmp_path / "site-packages" / "data").mkdir()
    (tmp_path / "site-packages" / "data" / "foreign.yaml").write_text("another project's")
    monkeypatch.setattr(resources, "_PACKAGE", copies.parent)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return copies


def test_the_working_directory_comes_before_the_packages_copy(package):
    assert find("data/small.yaml") == package / "data/small.yaml"
    Path("data").mkdir()
    Path("data/small.yaml").write_text("mine")
    assert find("data/small.yaml").read_text() == "mine"


def test_a_checkout_serves_its_own_files_from_anywhere(tmp_path, monkeypatch):
    repository = Path(resources.__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    assert find("configs/tiny.yaml") == repository / "configs/tiny.yaml"


def test_what_lies_beside_an_installed_package_is_not_ours(package):
    with pytest.raises(UserError):
        find("data/foreign.yaml")


def test_an_absolute_path_is_looked_for_there_alone(package, tmp_path):
    with pytest.raises(UserError) as caught:
        find(f"{tmp_path}/data/small.yaml")
    assert str(package) not in str(caught.value)


def test_a_missing_file_names_every_place_and_what_there_is(package):
    with pytest.raises(UserError) as caught:
        card_path("smal")
    assert str(Path("data/smal.yaml").absolute()) in str(caught.value)
    assert str(package / "data/smal.yaml") in str(caught.value)
    assert str(caught.value).endswith("there are data/small.yaml; did you mean 'small'?")


def test_a_card_is_a_name_or_a_path(package):
    assert card_path("small") == package / "data/small.yaml"
    Path("own.yaml").write_text("mine")
    assert card_path("own.yaml") == Path("own.yaml")


def test_a_name_stands_for_a_file_of_the_package(package, tmp_path):
    (package / "configs/finetune").mkdir(parents=True)
    (package / "configs/tiny.yaml").write_text("copy")
    (package / "configs/finetune/tiny.yaml").write_text("copy")
    assert find("tiny", among="configs/*.yaml") == package / "configs/tiny.yaml"
    assert find("finetune/tiny", among="configs/*.yaml") == package / "configs/finetune/tiny.yaml"
    with pytest.raises(UserError):
        find("tiny.yaml", among="configs/*.yaml")
    with pytest.raises(UserError, match=r"there are configs/tiny.yaml; did you mean 'tiny'\?"):
        find("tinny", among="configs/*.yaml")
    Path("tiny").write_text("mine")
    assert find("tiny", among="configs/*.yaml").read_text() == "mine"
