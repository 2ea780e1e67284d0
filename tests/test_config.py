"""Configuration files, overrides, faults and hashes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from samaritan.config import (
    config_differences,
    config_keys,
    config_sha256,
    dump_config,
    load_config,
    parse_config,
)
from samaritan.errors import ConfigError

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if "\nvariants:" not in path.read_text("utf-8")  # those belong to tests/test_compare.py
]


@pytest.mark.parametrize(
    ("tree", "unknown", "near"),
    [
        ({"trainin": {"flip": []}}, "trainin", "training"),
        ({"federations": 1}, "federations", "federation"),
        ({"rank": 4}, "rank", "peft.rank"),
        ({"peft": {"rnk": 4}}, "peft.rnk", "peft.rank"),
        ({"roundss": 4}, "roundss", "rounds"),
        ({"training": {"learning-rate": 1}}, "training.learning-rate", "training.learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tree, unknown, near):
    with pytest.raises(ConfigError, match=rf"{unknown}: unknown key; did you mean {near}\?"):
        parse_config(tree)


def test_a_key_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ConfigError, match=r"zzzzzz: unknown key\n") as caught:
        parse_config({"zzzzzz": 1})
    assert "did you mean" not in str(caught.value)


def test_all_faults_come_in_one_message_each_under_its_key():
    tree = {
        "roundz": 3,
        "seed": -1,
        "peft": {"rank": 0},
        "model": {"image_size": 8},
        "data": {"context_slices": 2, "classes": {"a": 1, "b": 1}},
        "training": {"learning_rate": float("nan"), "dice_weight": float("inf")},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "my.yaml")
    message = caught.value.message
    assert message.startswith("my.yaml has 8 faults:")
    keys = (
        "roundz", "seed", "peft.rank", "model.image_size", "data.context_slices", "data.classes",
        "training.learning_rate", "training.dice_weight",
    )  # fmt: skip
    assert sorted(re.findall(r"^  - ([\w.]+): ", message, re.M)) == sorted(keys)


@pytest.mark.parametrize(
    ("item", "got"),
    [
        ("peft.rank=0", "0"),
        ("data.context_slices=4", "odd"),
        ("training.learning_rate=.nan", "finite"),
        ("federation.wait_s=.inf", "finite"),
        ("data.classes={}", "one structure"),
        ("data.classes={a: 0}", "from 1 on"),
        ("name=../elsewhere", "pattern"),
    ],
)
def test_values_out_of_range_are_refused(small_config, item, got):
    with pytest.raises(ConfigError, match=got) as caught:
        load_config(small_config, [item])
    assert item.partition("=")[0] in caught.value.message


def test_set_reads_nested_keys_and_yaml_values(small_config):
    config = load_config(
        small_config,
        [
            "rounds=5",
            "peft.rank=4",
            "data.classes={liver: 1, kidney: 2}",
            "training.flip=[left-right]",
            "data.pixel_mm=null",
            "data.note='1e3'",
            "training.learning_rate=1.0e-3",
            "model.image_size=[32, 48]",
        ],
    )
    assert (config.rounds, config.peft.rank) == (5, 4)
    assert config.data.classes == {"liver": 1, "kidney": 2}
    assert config.training.flip == ("left-right",)
    assert config.data.pixel_mm is None
    assert config.data.note == "1e3"
    assert config.training.learning_rate == 1e-3
    assert config.model.image_size == (32, 48)
    assert config.training.batch_size == load_config(small_config).training.batch_size


@pytest.mark.parametrize("item", ["rounds", "=3", "rounds.more=3", "peft.rank=[1", "name.a.b=1"])
def test_a_broken_override_is_refused_and_named(small_config, item):
    with pytest.raises(ConfigError) as caught:
        load_config(small_config, [item])
    assert caught.value.code == "SAM-C104"
    assert item in caught.value.message


@pytest.mark.parametrize(
    ("text", "code"), [("a: [", "SAM-C102"), ("- 1", "SAM-C102"), (None, "SAM-C101")]
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, code):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.code == code


def test_a_quorum_no_run_can_reach_is_refused():
    with pytest.raises(ConfigError, match=r"min_sites is 5 but data\.sites is 4"):
        parse_config({"data": {"source": "phantoms"}, "federation": {"min_sites": 5}})


def test_the_hash_does_not_depend_on_the_order_of_keys_but_on_every_value():
    tree = {"seed": 1, "rounds": 2, "peft": {"rank": 4, "preset": "flap-sam"}}
    hashes = {
        config_sha256(parse_config(dict(order))) for order in itertools.permutations(tree.items())
    }
    assert len(hashes) == 1
    assert config_sha256(parse_config(tree | {"seed": 2})) not in hashes
    assert config_sha256(parse_config(tree | {"peft": {"rank": 5}})) not in hashes


def test_classes_come_in_the_order_of_their_values_however_they_were_written():
    one = parse_config({"data": {"classes": {"liver": 2, "kidney": 1}}})
    other = parse_config({"data": {"classes": {"kidney": 1, "liver": 2}}})
    assert list(one.data.classes) == list(other.data.classes) == ["kidney", "liver"]
    assert config_sha256(one) == config_sha256(other)


def test_a_dumped_configuration_loads_to_the_same_hash(tmp_path):
    config = parse_config(
        {
            "data": {"classes": {"β": 3, "yes": 1}, "note": "a: b # c", "pixel_mm": 0.1},
            "training": {"learning_rate": 1e-5, "flip": ["left-right"]},
            "model": {"image_size": [32, 64]},
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert config_sha256(load_config(path)) == config_sha256(config)


def test_differences_name_the_keys_and_both_values():
    before, after = parse_config({"seed": 1}), parse_config({"seed": 2, "peft": {"rank": 3}})
    found = "\n".join(config_differences(before, after))
    assert "peft.rank" in found
    assert "seed" in found
    assert "1 -> 2" in found
    assert "rounds" not in found


def test_every_key_of_the_contract_is_known():
    wanted = {"rounds", "seed", "strategy", "peft.preset", "peft.rank", "data.sites"}
    assert wanted <= set(config_keys())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_configuration_loads_and_opens_with_its_command(path):
    assert load_config(path).rounds >= 1
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# samaritan simulate configs/{path.name}")


def test_the_demo_needs_no_data_and_hippocampus_a_folder():
    names = {path.name: load_config(path).data.source for path in CONFIGS}
    assert names["demo.yaml"] == "phantoms"
    assert names["hippocampus.yaml"] == "folder"
