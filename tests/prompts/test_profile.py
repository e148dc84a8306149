import json

import pytest
from jinja2 import Environment

from prompts import PromptError, layout_names, load_layout, load_profile
from prompts.profile import FOLDER, _jinja_string

GOOD = {"description": "d", "layout": "markers", "system": "s", "stop": []}


def write(path, table):
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return str(path)


@pytest.mark.parametrize("name", sorted(p.stem for p in (FOLDER / "profiles").glob("*.toml")))
def test_every_shipped_profile_names_a_shipped_layout(name):
    profile = load_profile(name)
    assert profile.layout in layout_names()
    assert profile.name == name


def test_the_tutor_boxes_its_answers():
    profile = load_profile("boxed")
    assert "MyLLM, a math and English tutor for students" in profile.system
    assert "\\boxed{}" in profile.system


def test_the_embedded_profile_is_short():
    assert len(load_profile("embedded").system) <= 10


@pytest.mark.parametrize("name", layout_names())
def test_every_layout_marks_what_the_assistant_says(name):
    layout = load_layout(name)
    assert "endgeneration" in layout.template
    assert all(token in layout.control for token in (layout.bos, layout.eos, layout.pad) if token)


def test_a_profile_can_be_a_file(tmp_path):
    path = write(tmp_path / "mine.toml", {**GOOD, "stop": ["\n\n"]})
    assert load_profile(path).stop == ("\n\n",)
    assert load_profile(path).name == "mine"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sytem": "x"}, "unknown key"),
        ({"system": 3}, "expected: a string"),
        ({"stop": "x"}, "expected: a list of strings"),
        ({"system": None}, "'system': missing"),
    ],
)
def test_a_broken_profile_is_named(tmp_path, change, expected):
    table = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    path = write(tmp_path / "mine.toml", table)
    with pytest.raises(PromptError, match=expected) as caught:
        load_profile(path)
    assert path in str(caught.value)


def test_a_typo_is_answered_with_the_choices():
    with pytest.raises(PromptError, match=r"did you mean 'embedded'\?") as caught:
        load_profile("embeded")
    assert "boxed" in str(caught.value)


def test_a_layout_without_generation_markers_is_refused(tmp_path):
    table = {
        "description": "",
        "bos": "",
        "eos": "",
        "pad": "",
        "end": "",
        "control": [],
        "template": "{{ messages }}",
    }
    with pytest.raises(PromptError, match="no generation markers"):
        load_layout(write(tmp_path / "bad.toml", table))


@pytest.mark.parametrize(
    "text", ["", 'it\'s "quoted"', "two\nlines\\n", "π σ 数学 🦆", "{{ x }}", "%}"]
)
def test_a_system_text_survives_the_template(text):
    assert (
        Environment(autoescape=True)
        .from_string(  # autoescape: only the literal is of interest
            "{%- set s = " + _jinja_string(text) + " -%}{{ s | safe }}"
        )
        .render()
        == text
    )
