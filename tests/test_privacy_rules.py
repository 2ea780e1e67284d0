"""What is refused before a run with a guarantee, and what is said of one that may begin."""

from __future__ import annotations

import copy

import pytest

from samaritan.config import Config, dump_config, load_config, parse_config
from samaritan.errors import ConfigError
from samaritan.privacy.accounting import epsilon_of
from samaritan.privacy.caveats import affordable_rounds, noise_to_clip, warnings_for
from samaritan.privacy.plan import PrivacyPlan, privacy_plan
from samaritan.privacy.rules import check_privacy
from samaritan.privacy.statement import describe

_EQUAL = {"federation": {"weighting": "uniform"}, "data": {"classes": {"liver": 1}}}
_PATIENT = _EQUAL | {"privacy": {"unit": "patient", "epsilon": 8, "records": 200}}
_SLICE = _EQUAL | {
    "privacy": {"unit": "slice", "epsilon": 8, "records": 2000},
    "data": {"classes": {"liver": 1}, "context_slices": 1},
}
_SITE = _EQUAL | {"privacy": {"unit": "site", "epsilon": 8, "records": 10}}
_MASKED = {
    "federation": {"weighting": "uniform", "secure_aggregation": True, "clip_norm": 1.0},
}
_UNITS = {"patient": _PATIENT, "slice": _SLICE, "site": _SITE, "masked": _MASKED}


def _config(tree: dict, changes: dict) -> Config:
    """The tree with `section.key: value` changes; None takes the key out."""
    tree = copy.deepcopy(tree)
    for key, value in copy.deepcopy(changes).items():
        *section, leaf = key.split(".")
        node = tree.setdefault(section[0], {}) if section else tree
        node[leaf] = value
        if value is None:
            del node[leaf]
    return parse_config(tree)


def _refused(tree: dict, changes: dict) -> list[str]:
    """The faults of a configuration, each beginning with its key."""
    config = _config(tree, changes)
    try:
        check_privacy(config)
    except ConfigError as error:
        code, message = error.code, error.message
    else:
        return []
    assert code == "SAM-C402"
    return [line.removeprefix("  - ") for line in message.splitlines()[1:]]


def _keys(tree: dict, changes: dict) -> list[str]:
    return [fault.partition(":")[0] for fault in _refused(tree, changes)]


_EVERY = ("patient", "slice", "site")
_AT_SITES = ("patient", "slice")
_REFUSED: list[tuple[tuple[str, ...], dict, str]] = [
    (_EVERY, {"privacy.epsilon": None}, "privacy.epsilon"),
    (_EVERY, {"privacy.records": None}, "privacy.records"),
    (_EVERY, {"privacy.delta": 0.2}, "privacy.delta"),
    (_AT_SITES, {"privacy.records": {"A": 5, "B": 10}, "privacy.delta": 0.1}, "privacy.delta"),
    (_EVERY, {"federation.weighting": "examples"}, "federation.weighting"),
    (_EVERY, {"training.scaffold": True}, "training.scaffold"),
    (_EVERY, {"selection.keep": "best"}, "selection.keep"),
    (_EVERY, {"selection.patience": 3}, "selection.patience"),
    (_EVERY, {"selection.rollback_drop": 0.1}, "selection.rollback_drop"),
    (_EVERY, {"data.classes": None}, "data.classes"),
    (_AT_SITES, {"training.prefix_cache_mb": 100}, "training.prefix_cache_mb"),
    (("site",), {"federation.weighting": {"A": 1.0, "B": 2.0}}, "federation.weighting"),
    (("site", "masked"), {"strategy": "svd"}, "strategy"),
    (("site", "masked"), {"strategy": "median"}, "strategy"),
    (("site", "masked"), {"strategy": "krum"}, "strategy"),
    (("site", "masked"), {"strategy": "fedsa"}, "strategy"),
    (("site",), {"federation.clip_norm": "median"}, "federation.clip_norm"),
    (("site",), {"privacy.records": {"A": 10}}, "privacy.records"),
    (("site",), {"privacy.clip_quantile": 0.5}, "privacy.clip_quantile"),
    (("masked",), {"federation.weighting": "examples"}, "federation.weighting"),
    (("masked",), {"federation.weighting": {"A": 1.0}}, "federation.weighting"),
    (("masked",), {"federation.clip_norm": None}, "federation.clip_norm"),
    (("masked",), {"federation.clip_norm": "median"}, "federation.clip_norm"),
    (("masked",), {"federation.min_sites": 2}, "federation.min_sites"),
    (("masked",), {"federation.sites_per_round": 2}, "federation.sites_per_round"),
    (("masked",), {"peft.site_ranks": {"A": 2}}, "peft.site_ranks"),
    (("masked",), {"data.site_classes": {"A": {"liver": 1}}}, "data.site_classes"),
    (("masked",), {"training.scaffold": True}, "training.scaffold"),
    (("masked",), {"wire.up": {"numbers": "int8"}}, "wire.up"),
    (("masked",), {"wire.up": {"top_k": 0.1}}, "wire.up"),
    (("masked",), {"wire.up": {"low_rank": 2}}, "wire.up"),
    (("masked",), {"data": {"source": "phantoms", "sites": 2}}, "data.sites"),
    (("masked",), {"data": {"partition": "uniform", "sites": 2}}, "data.sites"),
    (
        ("masked",),
        {"data": {"source": "phantoms", "sites": 3, "held_out_sites": ["A"]}},
        "data.sites",
    ),
    (
        ("masked",),
        {"privacy": _SITE["privacy"], "data.classes": {"liver": 1}},
        "privacy.unit",
    ),
]


@pytest.mark.parametrize(
    ("unit", "changes", "key"), [(u, c, k) for units, c, k in _REFUSED for u in units]
)
def test_a_run_that_would_break_its_guarantee_is_refused_by_that_key_alone(unit, changes, key):
    assert _keys(_UNITS[unit], changes) == [key]


@pytest.mark.parametrize("unit", _UNITS)
def test_a_plain_guarantee_is_not_refused(unit):
    assert _refused(_UNITS[unit], {}) == []


@pytest.mark.parametrize(
    ("unit", "changes"),
    [
        *((unit, {"strategy": name}) for unit in _AT_SITES for name in ("svd", "krum", "fedsa")),
        *((unit, {"federation.weighting": {"A": 1.0, "B": 2.0}}) for unit in _AT_SITES),
        *((unit, {"federation.clip_norm": "median"}) for unit in _AT_SITES),
        *((unit, {"privacy.clip_quantile": 0.5}) for unit in _AT_SITES),
        *((unit, {"wire.up": {"numbers": "int8", "top_k": 0.1}}) for unit in _EVERY),
        *((unit, {"personal.fine_tune_steps": 5}) for unit in _UNITS),
        *((unit, {"personal.parts": ["decoder"]}) for unit in _UNITS),
        *((unit, {"strategy": "ffa"}) for unit in _UNITS),
        *((unit, {"data": {"source": "phantoms", "context_slices": 1}}) for unit in _UNITS),
        *(
            (unit, {"privacy.scores": "declared", "selection.keep": "best"})
            for unit in _EVERY
        ),
        ("site", {"training.prefix_cache_mb": 100}),
        ("site", {"federation.clip_norm": 1.0}),
        ("masked", {"federation.clip_norm": 2}),
        ("masked", {"federation.min_sites": 3, "federation.sites_per_round": 3}),
        ("masked", {"data": {"partition": "manifest", "sites": 2}}),
        ("masked", {"wire.down": {"numbers": "int8"}}),
        ("patient", {"federation.secure_aggregation": True, "federation.clip_norm": 1.0}),
        ("patient", {"privacy.delta": 0.0049}),
    ],
)  # fmt: skip
def test_what_cannot_weaken_a_guarantee_is_allowed(unit, changes):
    assert _refused(_UNITS[unit], changes) == []


def test_a_run_without_privacy_is_not_looked_at():
    changes = {"training.scaffold": True, "selection.keep": "best", "strategy": "svd"}
    assert _refused({}, changes) == []


def test_a_budget_without_a_unit_is_refused_and_unit_none_is_not():
    assert _keys({}, {"privacy.epsilon": 8}) == ["privacy.unit"]
    assert _refused({}, {"privacy.epsilon": 8, "privacy.unit": "none"}) == []


def test_the_resolved_configuration_of_a_run_without_privacy_can_be_read_again(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(Config()), "utf-8")
    check_privacy(load_config(path))


def test_all_faults_come_in_one_message_each_with_what_to_set():
    changes = {
        "privacy.epsilon": None, "federation.weighting": "examples", "data.classes": None,
        "selection.patience": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="it has 4 faults:") as caught:
        check_privacy(_config(_PATIENT, changes))
    for text in ("such as 8", "set uniform", "name them", "privacy.scores to declared"):
        assert text in caught.value.message


def test_the_message_names_the_site_whose_delta_is_too_large():
    changes = {"privacy.records": {"A": 5, "B": 10}, "privacy.delta": 0.1}
    assert _refused(_PATIENT, changes) == [
        "privacy.delta: at 0.1 one of 10 records of B may be published whole within the "
        "guarantee; leave it out for 1 / (10 records)"
    ]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("epsilon", ".inf", "finite number"),
        ("epsilon", "0", "greater than 0"),
        ("epsilon", "-1", "greater than 0"),
        ("noise_multiplier", "-0.5", "greater than 0"),
        ("noise_multiplier", "0", "greater than 0"),
        ("noise_multiplier", ".nan", "finite number"),
        ("delta", "1", "less than 1"),
        ("sampling_rate", "1.5", "less than or equal to 1"),
        ("clip_norm", "0", "greater than 0"),
        ("records", "0", "greater than or equal to 1"),
    ],
)
def test_a_number_that_promises_nothing_is_refused_when_it_is_read(tmp_path, key, value, says):
    path = tmp_path / "run.yaml"
    path.write_text(f"privacy:\n  unit: patient\n  {key}: {value}\n", "utf-8")
    with pytest.raises(ConfigError, match=rf"privacy\.{key}: Input should be .*{says}") as caught:
        load_config(path)
    assert caught.value.code == "SAM-C103"


# What is said


def _plan(tree: dict = _PATIENT, changes: dict | None = None) -> tuple[Config, PrivacyPlan]:
    config = _config(tree, changes or {})
    return config, privacy_plan(config, "A")


@pytest.mark.parametrize("unit", _EVERY)
def test_the_statement_gives_all_six_parts_in_one_sentence(unit):
    config, plan = _plan(_UNITS[unit], {"privacy.noise_multiplier": 4.5, "rounds": 7})
    text = describe(plan)
    sampling = "no sampling" if unit == "site" else "Poisson sampling at rate 0.1"
    steps = "1 step of each of 7 rounds" if unit == "site" else "20 steps of each of 7 rounds"
    for part in (
        "epsilon at most 8 ", "delta 1e-05", f"unit: {unit}", f"adjacency: one {unit} added or",
        sampling, "Gaussian mechanism", "noise multiplier 4.5", steps,
    ):  # fmt: skip
        assert part in text
    assert text.count(". ") == 0
    assert text.endswith(".")
    assert ("must be trusted" in text) == (unit == "site")
    assert config.privacy.epsilon == plan.epsilon


def _warns(tree: dict, changes: dict, says: str, parameters: int = 150_000) -> bool:
    config, plan = _plan(tree, {"strategy": "ffa", "privacy.noise_multiplier": 20.0} | changes)
    return any(says in text for text in warnings_for(config, plan, parameters))


@pytest.mark.parametrize(
    ("tree", "changes", "says", "without"),
    [
        (_PATIENT, {"privacy.epsilon": 9}, "not a guarantee about membership", {}),
        (_SLICE, {}, "for one of 40 slices, group privacy leaves epsilon 320", None),
        (_PATIENT, {"strategy": "fedavg"}, "puts noise on both factors", {}),
        (_PATIENT, {"privacy.records": 9}, "A step expects 0.9 patients", {}),
        (_PATIENT, {}, "With 200 patients, expect a clear loss of Dice",
         {"privacy.records": 3000}),
        (_PATIENT, {}, "expect a clear loss of Dice", {"privacy.epsilon": 9}),
        (_PATIENT, {"privacy.scores": "declared"}, "scores leave the sites without noise", {}),
        (_PATIENT, {"personal.fine_tune_steps": 3}, "trains without noise", {}),
        (_SITE, {}, "With 10 sites, the noise of a round is 775 times",
         {"privacy.records": 10_000}),
        (_PATIENT, {"privacy.noise_multiplier": 2.0, "privacy.epsilon": 2},
         "enough for 3 of 10 rounds", {}),
    ],
)  # fmt: skip
def test_a_weak_promise_is_called_weak_and_a_better_one_is_not(tree, changes, says, without):
    assert _warns(tree, changes, says)
    if without is not None:
        assert not _warns(tree, without, says)


def test_a_sound_guarantee_has_no_warning():
    config, plan = _plan(_PATIENT, {"strategy": "ffa", "privacy.records": 5000})
    assert warnings_for(config, plan, 150_000) == []


def test_noise_to_clip_is_the_norm_of_the_noise_on_the_mean():
    _, plan = _plan(_PATIENT, {"privacy.noise_multiplier": 2.0})
    assert noise_to_clip(plan, 10_000) == pytest.approx(2.0 * 100 / 20)


def test_the_affordable_rounds_are_the_most_within_the_budget():
    _, plan = _plan(_PATIENT, {"privacy.noise_multiplier": 2.0, "privacy.epsilon": 2})
    rounds = affordable_rounds(plan)
    assert 0 < rounds < plan.rounds
    within, beyond = (epsilon_of([plan.spending(n)], plan.delta).pld for n in (rounds, rounds + 1))
    assert within <= plan.epsilon < beyond
    _, poor = _plan(_PATIENT, {"privacy.noise_multiplier": 2.0, "privacy.epsilon": 0.1})
    assert affordable_rounds(poor) == 0
    _, rich = _plan(_PATIENT, {"privacy.noise_multiplier": 2.0, "privacy.epsilon": 4})
    assert affordable_rounds(rich) == rich.rounds
