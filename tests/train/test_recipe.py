import json
import re
from pathlib import Path
from unittest import mock

import pytest
from pydantic import ValidationError
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from gearshift.train import (
    AllocationSampling,
    DistillationSettings,
    LayerwiseStage,
    PresetSampling,
    Recipe,
    SftStage,
    StochasticStage,
    load_recipe,
)
from gearshift.train.recipe import StageSettings

RECIPE = """
model: supernet
output: run
batch_size: 4
stages:
  - {type: layerwise, steps: 3}
  - type: stochastic
    steps: 2
    losses: {forward_kl: 1, cross_entropy: 0.1}
    sampling: {type: presets, probabilities: {fast: 0.2}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_read_with_its_defaults(path: Path) -> None:
    recipe = load_recipe(path)
    layerwise, stochastic = recipe.stages
    assert isinstance(layerwise, LayerwiseStage)
    assert isinstance(stochastic, StochasticStage)
    assert (layerwise.learning_rate, stochastic.learning_rate) == (2e-3, 5e-4)
    assert stochastic.losses.cross_entropy == 0.1
    assert isinstance(stochastic.sampling, PresetSampling)
    assert isinstance(stochastic.sampling.otherwise, AllocationSampling)
    assert (recipe.teacher, recipe.device, recipe.total_steps) == ("self", "auto", 5)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_overrides_reach_every_depth_and_are_yaml(path: Path) -> None:
    overrides = ["stages.0.steps=10", "optimiser.betas=[0.8, 0.9]", "text=null", "stages.1.sampling={type: uniform}"]
    recipe = load_recipe(path, [*overrides, "learning_rate_scales={'*.A_log': 0.1}", "stages.0.schedule.warmup=0.5"])
    assert recipe.stages[0].steps == 10
    assert recipe.optimiser.betas == (0.8, 0.9)
    assert recipe.stages[1].sampling.type == "uniform"
    assert recipe.learning_rate_scales == {"*.A_log": 0.1}
    assert recipe.stages[0].schedule.warmup == 0.5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.0.stpes=1", "unknown key 'stages.0.stpes': did you mean steps?"),
        ("batchsize=1", "unknown key 'batchsize': did you mean batch_size?"),
        ("stages.1.losses.kl=1", "unknown key 'stages.1.losses.kl'"),
        ("stages.0.seed=1", "unknown key 'stages.0.seed'$"),
        ("stages.1.stream=student", "unknown key 'stages.1.stream': it belongs to type layerwise, not stochastic$"),
        ("stages.0.recompute=true", "unknown key 'stages.0.recompute': it belongs to type stochastic or sft, not"),
        ("stages.1={type: sft, steps: 1, losses: {activation: 1}}",
         "unknown key 'stages.1.losses.activation': it belongs to type stochastic, not sft$"),
        ("stages.1.sampling.otherwise={type: uniform, weights: {}}",
         r"'stages\.1\.sampling\.otherwise\.weights': it belongs to type weighted, not uniform$"),
        ("stages.2.steps=1", "'2' is no index into a list of 2"),
        ("seed.x.y=1", "seed: input should be a valid integer"),
        ("model.x=1", "'model.x=1' goes too deep: model is 'supernet', which has no parts"),
        ("batch_size", "'batch_size' is not an override: write key=value"),
        ("batch_size=[", r"the value in 'batch_size=\[' is not valid YAML"),
        ("batch_size=0", "batch_size: input should be greater than or equal to 1, not 0"),
        ("batch_size=many", "batch_size: input should be a valid integer.*, not 'many'"),
        ("stages=[]", r"stages: give a list of at least 1, not \[\]"),
        ("data=[]", r"data: give a list of at least 1, not \[\]"),
        ("chats=[]", r"chats: give a list of at least 1, not \[\]"),
        ("data=a.txt", "data: give a list, not 'a.txt'"),
        ("data=[a.txt]", "data.0: give a mapping of keys to values, not 'a.txt'"),
        ("data=[{path: ''}]", "data.0.path: .*at least 1 character, not ''"),
        ("text=' '", "text: give a path, not an empty text"),
        ("optimiser.betas=[0.9]", r"optimiser.betas: give a longer list, not \[0.9\]"),
        ("optimiser.betas=[0.9, 0.9, 0.9]", r"optimiser.betas: give a list of at most 2, not \[0.9, 0.9, 0.9\]"),
        ("learning_rate_scales=[1]", r"learning_rate_scales: give a mapping of keys to values, not \[1\]"),
        (f"parallel={'x' * 200}", "parallel: give a mapping of keys to values, not 'x{99}\\.\\.\\.$"),
        ("stages.0.type=layerwize", "stages.0.type: give one of 'layerwise', 'stochastic', 'sft', not 'layerwize'"),
        ("stages.1.sampling={}", "the key 'stages.1.sampling.type' is missing"),
        ("stages.1.sampling=uniform", "stages.1.sampling: give a mapping of keys to values, not 'uniform'"),
        ("gradient_accumulation=3", "stage 0: 4 sequences a step cannot be processed in 3 equal parts"),
        ("stages.1.losses={forward_kl: 0}", "at least one of them must be positive"),
        ("stages.1.sampling={type: weighted, weights: {a: -1}}", "stages.1.sampling.weights: weights: 'a' has -1"),
        ("model=", "model: "),
        ("attn_implementation=foo",
         "attn_implementation: there is no attention function 'foo': choose .*sdpa, eager, .*, or a kernel of the hub"),
        ("learning_rate_scales={'*': -1}", "greater than or equal to 0"),
        ("stages.0={type: layerwise, steps: 1, calibration: none, ridge: 0.5}",
         "stages.0.layerwise: ridge 0.5 holds calibration: ridge, not none: leave it out"),
        ("stages.0={type: layerwise, steps: 1, calibration: scale, ridge: 2}", "ridge 2 holds calibration: ridge, not"),
        ("stages.1={type: stochastic, steps: 1, temperature: 2, losses: {forward_kl: 0, activation: 1}}",
         "stages.1.stochastic: temperature 2 is that of forward_kl and reverse_kl, which have no weight: leave it out"),
        ("stages.1={type: sft, steps: 1, temperature: 0.5}", "stages.1.sft: temperature 0.5 is that of forward_kl"),
        ("trackers=[wandb, tensorboard, wandb]", "trackers: wandb comes twice: name each once"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_sentence(path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        load_recipe(path, [override])
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sources", ["text", "data", "chats"])
def test_an_output_folder_within_what_is_read_is_refused(path: Path, sources: str) -> None:
    more = ["output=corpus/runs/one", "stages.0={type: sft, steps: 1}", "chats=[{path: chats.jsonl}]"]
    for folder in ("corpus", "./corpus/runs", "other/../corpus"):
        given = folder if sources == "text" else f"[{{path: {folder}}}]"
        with pytest.raises(ValueError, match=rf"corpus/runs/one lies in {folder}, so a resumed run would read its own"):
            load_recipe(path, [*more, f"{sources}={given}"])
    beside = "corpora" if sources == "text" else "[{path: corpora}]"
    load_recipe(path, [*more, f"{sources}={beside}"])


def test_a_teacher_that_no_stage_learns_from_is_refused(path: Path) -> None:
    more = ["teacher=another", "chats=[{path: chats.jsonl}]"]
    with pytest.raises(ValueError, match="no stage learns from a teacher: leave teacher out, or weigh a loss that"):
        load_recipe(path, [*more, "stages=[{type: sft, steps: 1}]"])
    load_recipe(path, [*more, "stages=[{type: sft, steps: 1}, {type: layerwise, steps: 1}]"])
    load_recipe(path, [*more, "stages=[{type: sft, steps: 1, losses: {reverse_kl: 1}}]"])


def test_attention_functions_of_transformers_of_the_hub_and_of_ones_own_are_known(path: Path) -> None:
    names = ["eager", "sdpa", "flash_attention_2", "flex_attention", "kernels-community/flash-attn2", "my_own"]
    with mock.patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, my_own=sdpa_mask):
        found = [load_recipe(path, [f"attn_implementation={name}"]).attn_implementation for name in names]
    assert found == names


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stages: [", "is not valid YAML"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("model: m\nstages: [{type: layerwise, steps: 1}]", "the key 'output' is missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml.*{sentence}"):
        load_recipe(path)
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_every_setting_says_what_it_means() -> None:
    schema = Recipe.model_json_schema()
    models = {"Recipe": schema, **schema["$defs"]}
    for name, model in models.items():
        for field, described in model["properties"].items():
            assert described.get("description"), f"{name}.{field}"
    assert json.dumps(schema)


def test_settings_in_memory_need_no_files() -> None:
    settings = DistillationSettings(stages=[LayerwiseStage(steps=1, batch_size=6)], gradient_accumulation=3)
    assert (settings.batch_size_of(0), settings.parts_of(0)) == (6, 3)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: a\noutput: b\nmodel: c\nstages: []\n")
    with pytest.raises(ValueError, match="the key 'model' comes twice"):
        load_recipe(file)


@pytest.mark.parametrize("guide", ["data.md", "recipes.md"])
def test_the_training_recipes_of_the_guides_can_be_read(tmp_path: Path, guide: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / guide).read_text()
    given = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if block.startswith("model:")]
    path = tmp_path / "recipe.yaml"
    recipes = []
    for block in given:
        path.write_text(block)
        recipes.append(load_recipe(path))
    assert len(recipes) >= 2
    if guide == "data.md":
        assert [source.weight for source in recipes[0].sources] == [3, 1, 6]
        assert [source.field for source in recipes[1].chats] == ["messages", "conversations", "messages"]


@pytest.mark.parametrize("settings", [Recipe, LayerwiseStage, StochasticStage, SftStage])
def test_the_guide_has_every_key_and_the_stages_rates(settings: type[Recipe] | type[StageSettings]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert [key for key in settings.model_fields if f"| `{key}` |" not in text] == []
    if issubclass(settings, StageSettings):
        fields = settings.model_fields
        rate = f"{fields['learning_rate'].default:.0e}".replace("e-0", "e-")
        assert f"{rate} {fields['type'].default}" in text
