"""Every recipe in `recipes/` can be read, and every command in the README exists."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gearshift.cli import app
from gearshift.formats.spec_file import read_spec
from gearshift.quickstart_job import QuickstartSettings
from gearshift.settings import load_settings
from gearshift.surgery import load_surgery
from gearshift.train import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path: Path) -> None:
    text = path.read_text()
    if "edits:" in text:
        assert load_surgery(path).edits
    elif "decoder:" in text:
        assert read_spec(path).is_supernet
    elif "distillation:" in text:
        settings = load_settings(QuickstartSettings, path)
        assert settings.export in settings.presets
        assert (path.parent / settings.surgery).is_file()
    else:
        assert load_recipe(path).stages


def test_every_verb_and_option_of_the_readme_exists() -> None:
    commands = re.findall(r"^    gearshift (\w+)(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {verb for verb, _ in commands} >= {"convert", "info", "train", "eval", "search", "export", "generate"}
    for verb, rest in commands:
        shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, verb
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown.output, f"{verb} has no {option}"
