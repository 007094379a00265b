import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from aograph.kernels.rounding import ALGORITHMS
from hypothesis import given, settings
from hypothesis import strategies as st

from aograph import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicSparse24,
    Int8WeightOnly,
    Keep,
    Recipe,
    RecipeError,
    Rule,
    Sparse24,
)
from aograph.predicate import Shape
from aograph.statistics import LinearStatistics

SHAPE = Shape(sympy.Integer(4), 128, 64, (4, 4))


@dataclass
class Candidate:
    name: str = "model.layers.0.mlp.up_proj"
    operator: str = "linear"
    module: str = "torch.nn.modules.linear.Linear"
    shape: Shape | None = SHAPE
    kind: str = "linear"


# --- strings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, rules",
    [
        ("int8wo", [Rule(Int8WeightOnly())]),
        ("int8wo(group_size=128)", [Rule(Int8WeightOnly(group_size=128))]),
        (" int4wo ", [Rule(Int4WeightOnly())]),
        ("int4wo()", [Rule(Int4WeightOnly())]),
        ("int4wo(group_size=128)", [Rule(Int4WeightOnly(128))]),
        ("int4wo( group_size = 128 , algorithm = mse )", [Rule(Int4WeightOnly(128, "mse"))]),
        ("int4wo(algorithm='mse')", [Rule(Int4WeightOnly(algorithm="mse"))]),
        ("int4wo+lm_head:int8wo", [Rule(Int4WeightOnly()), Rule(Int8WeightOnly(), name="lm_head")]),
        ("int4wo + *.mlp.*:none", [Rule(Int4WeightOnly()), Rule(Keep(), name="*.mlp.*")]),
        (r"re:.*layers\.0\..*:none", [Rule(Keep(), name=r"re:.*layers\.0\..*")]),
        ("a:int8wo(algorithm=mse)", [Rule(Int8WeightOnly("mse"), name="a")]),
        ("int8dq-sparse24(method=wanda)", [Rule(Int8DynamicSparse24(method="wanda"))]),
    ],
)
def test_strings(text, rules):
    assert Recipe.of(text).rules == tuple(rules)


def test_a_recipe_that_is_shipped_composes():
    rules = Recipe.of("vit").rules
    assert [rule.scheme for rule in rules] == [Int8Dynamic(), Int8DynamicSparse24(), Sparse24()]
    assert Recipe.of(" vit + head:int8wo").rules == (*rules, Rule(Int8WeightOnly(), name="head"))
    assert Recipe.from_toml(Recipe.of("vit").to_toml()) == Recipe.of("vit")


@pytest.mark.parametrize(
    "names",
    [
        ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"],  # timm
        ["encoder.layers.0.attn.qkv", None, "encoder.layers.0.mlp.lin1", "encoder.layers.0.mlp.lin2"],  # SAM
        ["encoder.layers.encoder_layer_0.self_attention.in_proj_weight", None, "encoder.layers.encoder_layer_0.mlp.0",
         "encoder.layers.encoder_layer_0.mlp.3", "heads.head"],
        ["vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.0.attention.output.dense",
         "vit.encoder.layer.0.intermediate.dense", "vit.encoder.layer.0.output.dense", "pooler.dense"],
        ["layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj", "layers.0.linear1", "layers.0.linear2"],
        ["blocks.0.attn.qkv", None, "blocks.0.mlp.w12", "blocks.0.mlp.w3", "patch_embed.proj"],
    ],
)  # fmt: skip
def test_the_recipe_for_vits_knows_their_names(names):
    expected = ["int8dq", "int8dq", "int8dq-sparse24", "sparse24", None]
    for name, wanted in zip(names, expected, strict=False):
        if name is not None:
            found = Recipe.of("vit").decide(Candidate(name))
            assert (str(found[1].scheme) if found else None) == wanted, name


@pytest.mark.parametrize(
    "text, message",
    [
        ("int4w", "unknown scheme 'int4w'; did you mean 'int4wo'"),
        ("", "is no recipe"),
        ("int4wo+", "is no recipe"),
        ("int4wo(groupsize=64)", "unknown key 'groupsize' for int4wo; did you mean 'group_size'"),
        ("int4wo(group_size)", "'group_size' in .* is no parameter=value"),
        ("int4wo(group_size=65)", "group_size=65 is unknown; "),
        ("int8wo(group_size=65)", "int8wo: group_size=65 is unknown; "),
        ("none(group_size=64)", "unknown key 'group_size' for none"),
        ("lm_head:int9wo", "did you mean 'int8wo'|did you mean 'int4wo'"),
        ("re:[:int8wo", "is no regular expression"),
    ],
)
def test_strings_that_are_no_recipe(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.of(text)


# --- other forms -------------------------------------------------------------------------------------------


def test_forms(tmp_path):
    rule = Rule(Int8WeightOnly(), name="a")
    recipe = Recipe((rule,))
    assert Recipe.of(recipe) is recipe
    assert Recipe.of([rule]) == Recipe.of((rule,)) == Recipe.of(iter([rule])) == recipe
    assert Recipe.of(Int8WeightOnly()) == Recipe((Rule(Int8WeightOnly()),))
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.of(path) == Recipe.of(str(path)) == recipe


@pytest.mark.parametrize("source", [3, None, [], [Int8WeightOnly()], ["int8wo"], {}])
def test_what_is_no_recipe(source):
    with pytest.raises(RecipeError, match="is no recipe: give a preset"):
        Recipe.of(source)


def test_a_rule_needs_a_scheme():
    with pytest.raises(RecipeError, match="not 'int8wo'"):
        Rule("int8wo")
    with pytest.raises(RecipeError, match="knows M, N and K"):
        Rule(Keep(), shape="k > 3")


# --- TOML --------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
schemes = st.one_of(
    st.just(Keep()),
    st.builds(Int8WeightOnly, st.sampled_from(sorted(ALGORITHMS)), st.sampled_from([None, 32, 64, 128, 256])),
    st.builds(Int4WeightOnly, st.sampled_from([32, 64, 128, 256]), st.sampled_from(sorted(ALGORITHMS))),
)
rules = st.builds(
    Rule,
    schemes,
    name=st.none() | texts.filter(lambda t: not t.startswith("re:")) | st.just(r"re:.*\.\d+\.[\"'a]"),
    operator=st.none() | texts,
    module=st.none() | texts,
    shape=st.none() | st.sampled_from(["K >= 1024 and M <= 16", "not N == 3"]),
    optional=st.booleans(),
)


@settings(max_examples=200)
@given(st.lists(rules, min_size=1, max_size=4).map(tuple).map(Recipe))
def test_toml_round_trip(recipe):
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"no \[\[rule\]\]"),
        ("rule = 3", r"no \[\[rule\]\]"),
        ("[[rules]]\nscheme = 'int8wo'", "unknown key 'rules' in the recipe; did you mean 'rule'"),
        ("[[rule]", "is no TOML"),
        ("[[rule]]\nname = 'a'", "rule 1: unknown scheme None"),
        ("[[rule]]\nscheme = 'int8wo'\n[[rule]]\nscheme = 'int44wo'", "rule 2: unknown .* did you mean 'int4wo'"),
        ("[[rule]]\nscheme = 'int4wo'\ngroupsize = 64", "rule 1: unknown key 'groupsize' .* 'group_size'"),
        ("[[rule]]\nscheme = 'int4wo'\nnmae = 'a'", "unknown key 'nmae' for int4wo; did you mean 'name'"),
        ("[[rule]]\nscheme = 'int4wo'\ngroup_size = 3", "group_size=3 is unknown"),
    ],
)
def test_toml_that_is_no_recipe(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(text)


@pytest.mark.parametrize(
    "line", ["name = 3", "operator = []", "shape = 7", "module = true", "optional = 'yes'", "scheme = ['int8wo']"]
)
def test_toml_with_values_of_the_wrong_kind(line):
    text = f"[[rule]]\n{line}\n" + ("" if line.startswith("scheme") else "scheme = 'int8wo'\n")
    with pytest.raises(RecipeError, match=line.partition(" ")[0]):
        Recipe.from_toml(text)


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none.toml cannot be read: No such file"):
        Recipe.of(tmp_path / "none.toml")


def test_a_function_has_no_text():
    with pytest.raises(RecipeError, match="cannot be written as TOML"):
        Recipe.of([Rule(Keep(), shape=lambda s: True)]).to_toml()


# --- matching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selectors, expected",
    [
        ({}, True),
        ({"name": "model.layers.*.mlp.*"}, True),
        ({"name": "model.layers.0.mlp.up_proj"}, True),
        ({"name": "mlp"}, False),
        ({"name": "Model.*"}, False),
        ({"name": r"re:.*\.\d\..*"}, True),
        ({"name": "re:up_proj"}, False),  # a full match
        ({"operator": "linear"}, True),
        ({"operator": "addmm"}, False),
        ({"module": "Linear"}, True),
        ({"module": "torch.nn.modules.linear.Linear"}, True),
        ({"module": "linear.Linear"}, False),
        ({"shape": "N == 128"}, True),
        ({"shape": "M > 4"}, False),
        ({"shape": lambda s: s.K == 64}, True),
        ({"shape": lambda s: s.M == 5}, False),
        ({"name": "model.*", "operator": "linear", "module": "Linear", "shape": "K == 64"}, True),
        ({"name": "model.*", "operator": "linear", "module": "Linear", "shape": "K == 65"}, False),
        ({"name": "other.*", "operator": "linear"}, False),
    ],
)
def test_selectors(selectors, expected):
    rule = Rule(Keep(), **selectors)
    assert rule.matches(Candidate()) is expected
    assert rule.selective == bool(selectors)


def test_what_is_no_linear_has_no_shape():
    assert Rule(Keep(), shape="K > 1").matches(Candidate(shape=None)) is False
    assert Rule(Keep(), shape=lambda s: s.K > 1).matches(Candidate(shape=None)) is False


M = sympy.Symbol("M", integer=True, positive=True)
DYNAMIC = Candidate(shape=Shape(M, 128, 64, (1, None)))


@pytest.mark.parametrize("shape", ["M <= 16", lambda s: s.M <= 16])
def test_a_predicate_on_a_dynamic_m_is_undecided(shape):
    recipe = Recipe.of([Rule(Int8WeightOnly()), Rule(Keep(), shape=shape)])
    assert recipe.undecided(DYNAMIC) == [2]
    assert recipe.decide(DYNAMIC)[0] == 1  # an undecided rule does not win
    recipe.check_selectors([DYNAMIC])  # but it may match


def test_the_last_rule_that_matches_wins():
    recipe = Recipe.of("int4wo + *.mlp.*:int8wo + *.up_proj:none")
    names = ["model.layers.0.attn.q", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    assert [recipe.decide(Candidate(name))[0] for name in names] == [1, 2, 3]
    again = Recipe.of("*.up_proj:none + int4wo")
    assert again.decide(Candidate())[0] == 2
    assert Recipe.of("lm_head:int8wo").decide(Candidate()) is None


def test_selectors_that_match_nothing():
    candidates = [Candidate(), Candidate("lm_head")]
    Recipe.of("int4wo+lm_head:int8wo").check_selectors(candidates)
    with pytest.raises(RecipeError, match=r"rule 2 .* matches nothing: no name 'lmhead'; did you mean 'lm_head'"):
        Recipe.of("int4wo+lmhead:int8wo").check_selectors(candidates)
    with pytest.raises(RecipeError, match="no operator 'Linear'; did you mean 'linear'"):
        Recipe.of([Rule(Keep(), operator="Linear")]).check_selectors(candidates)
    with pytest.raises(RecipeError, match="matches nothing among 2 candidates"):
        Recipe.of([Rule(Keep(), shape="K > 5000")]).check_selectors(candidates)
    Recipe.of([Rule(Keep(), name="lmhead", optional=True)]).check_selectors(candidates)
    Recipe.of("int4wo").check_selectors([])  # no selector, nothing to match


def test_text():
    assert str(Recipe.of("int4wo+a:none")) == "→ int4wo; name='a' → none"


# --- statistics --------------------------------------------------------------------------------------------

STATISTICS = {"lm_head.weight": LinearStatistics(-1.5, 2.0, torch.arange(4.0), 7)}


def calibrated(text="int4wo + lm_head:int8wo"):
    return replace(Recipe.of(text), statistics=STATISTICS)


def test_statistics_are_part_of_a_recipe():
    recipe = calibrated()
    other = {"lm_head.weight": LinearStatistics(-1.5, 2.0, torch.arange(4.0) + 1, 7)}
    assert recipe == calibrated() == copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe))
    assert recipe != Recipe.of("int4wo + lm_head:int8wo") and recipe != replace(recipe, statistics=other)
    assert hash(recipe) == hash(calibrated())
    assert Recipe.of(recipe).statistics is recipe.lenient().statistics is STATISTICS
    assert "tensor" not in repr(recipe)


def test_a_recipe_is_saved_with_its_statistics(tmp_path):
    path = tmp_path / "recipe.toml"
    model = tmp_path / "recipe.safetensors"
    model.write_text("a model of the same name")
    calibrated().save(path)
    assert Recipe.of(path) == Recipe.of(str(path)) == calibrated()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "recipe.safetensors", "recipe.statistics.safetensors", "recipe.toml",
    ]  # fmt: skip
    assert model.read_text() == "a model of the same name"
    Recipe.of("int8wo").save(path)
    assert Recipe.of(path) == Recipe.of("int8wo")  # those of before are not mistaken for its own


def test_statistics_that_are_not_where_the_recipe_says(tmp_path):
    path = tmp_path / "recipe.toml"
    calibrated().save(path)
    with pytest.raises(RecipeError, match=r"has statistics in 'recipe.statistics.safetensors', .* give the path"):
        Recipe.from_toml(path.read_text())
    (tmp_path / "recipe.statistics.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"recipe.statistics.safetensors cannot be read"):
        Recipe.of(path)
    path.write_text(f"statistics = 3\n{Recipe.of('int8wo').to_toml()}")
    with pytest.raises(RecipeError, match="statistics = 3 is a int: give the name of a file"):
        Recipe.of(path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(RecipeError, match=r"is a .toml file, not recipe.json: give .*recipe.toml"):
        calibrated().save(tmp_path / "recipe.json")
    with pytest.raises(RecipeError, match="cannot be written as TOML"):
        Recipe.of([Rule(Keep(), shape=lambda s: True)]).save(tmp_path / "recipe.toml")
    for recipe in (calibrated(), Recipe.of("int8wo")):
        with pytest.raises(RecipeError, match=r"cannot be written: .*No such file"):
            recipe.save(tmp_path / "none" / "recipe.toml")
    assert not list(tmp_path.iterdir())
