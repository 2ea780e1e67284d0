"""`samaritan compare`: variants of one run, their table, and what becomes of those that fail."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import yaml

from samaritan.config import config_differences, load_config
from samaritan.errors import ConfigError, StorageError
from samaritan.report.comparison import Failure, circumstances, compare_runs, to_markdown
from samaritan.report.comparison_plot import mean_curve, spread, write_plot
from simulation.compare import compare, load_comparison

ROOT = Path(__file__).parents[1]


# The file.


@pytest.fixture(scope="module")
def written(small_config, tmp_path_factory):
    """Writes a comparison on top of the small run: ``written(variants={...}, seeds=[0])``."""

    def write(**keys):
        tree = yaml.safe_load(small_config.read_text()) | keys
        path = tmp_path_factory.mktemp("comparison") / "compare.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


def refused(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_comparison(path, list(overrides))
    assert caught.value.code == "SAM-C308"
    return caught.value.message


def test_each_variant_is_the_file_with_its_own_keys_and_seed(written, small_config):
    variants = {
        "plain": {},
        "coded": {"strategy": "ffa", "wire.up.numbers": "int4", "peft.ranks": {"decoder": 1}},
    }
    path = written(variants=variants, seeds=[3, 1])
    comparison = load_comparison(path, ["rounds=2", "peft.rank=4"])
    assert comparison.name == "small"
    assert list(comparison.configs) == ["plain", "coded"]
    base = load_config(small_config, ["rounds=2", "peft.rank=4", "seed=3"])
    assert list(comparison.configs["plain"]) == [3, 1]
    assert comparison.configs["plain"][3] == base
    coded = comparison.configs["coded"][1]
    assert config_differences(base, coded) == [
        "peft.ranks.decoder: None -> 1",
        "seed: 3 -> 1",
        "strategy: 'fedavg' -> 'ffa'",
        "wire.up.numbers: 'fp32' -> 'int4'",
    ]


def test_a_variant_leaves_the_others_as_they_are(written):
    path = written(
        variants={"a": {"peft.ranks": {"decoder": 1}}, "b": {"peft.ranks.decoder": 2}, "c": {}},
        peft={"rank": 2, "ranks": {"encoder.qkv": 1}},
    )
    ranks = [seeds[0].peft.ranks for seeds in load_comparison(path).configs.values()]
    assert ranks == [{"decoder": 1}, {"encoder.qkv": 1, "decoder": 2}, {"encoder.qkv": 1}]


def test_one_seed_is_the_rule_and_it_is_0(written):
    assert list(load_comparison(written(variants={"a": {}})).configs["a"]) == [0]


def test_all_faults_of_all_variants_come_at_once_each_with_its_variants(written):
    variants = {
        "a": {"peft.rnk": 4, "rounds": 0},
        "b": {"peft.rnk": 4},
        "c": {"peft": {"rank": 4}, "rounds.first": 1},
        "d": {"data.site_classes.site_01": {"class_1": 1}, "seed": 2},
    }
    message = refused(written(variants=variants, wire={"upp": {}}))
    lines = message.splitlines()
    assert lines[0].endswith("has 7 faults:")
    assert "  - a, b: peft.rnk: unknown key; did you mean peft.rank?" in lines
    assert "  - every variant: wire.upp: unknown key; did you mean wire.up?" in lines
    assert "  - c: peft: is a section; set its keys one by one" in lines
    assert "  - c: rounds.first: goes through a value that is no section" in lines
    assert "  - d: data.site_classes.site_01: variants share their data and split" in lines
    assert "  - d: seed: a comparison has `seeds` instead" in lines
    assert any(line.startswith("  - a: rounds: ") and "got 0" in line for line in lines)


def test_one_seed_for_all_is_refused_where_seeds_are_asked_for(written):
    path = written(variants={"a": {}, "b": {}})
    assert "every variant: seed: a comparison has `seeds` instead" in refused(path, "seed=4")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, "variants: Field required"),
        ({"variants": {}}, "variants: Dictionary should have at least 1 item"),
        ({"variants": {"../up": {}}}, "variants.../up.[key]: String should match"),
        ({"variants": {"a": 3}}, "variants.a: Input should be a valid dictionary"),
        ({"variants": {"a": {}}, "seeds": []}, "seeds: "),
        ({"variants": {"a": {}}, "seeds": [1, 2, 1]}, "seeds: Value error, holds a seed twice"),
        ({"variants": {"a": {}}, "seeds": [-1]}, "seeds.0: "),
    ],
    ids=str,
)
def test_faults_of_the_two_keys_are_told_with_those_of_the_rest(written, keys, fault):
    message = refused(written(**keys, roundz=3))
    assert f"  - {fault}" in message
    assert "  - roundz: unknown key; did you mean rounds?" in message


def test_simulate_refuses_a_comparison_and_names_the_command(samaritan, written, tmp_path):
    path = written(variants={"a": {}})
    done = samaritan("simulate", path, "--out", tmp_path / "run")
    assert done.code == 1
    assert done.err.startswith(f"error: SAM-C307  {path} holds several variants of one run\n")
    assert f"samaritan compare {path}" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["compare", "communication"])
def test_the_comparisons_that_come_along_are_sound_and_open_with_their_command(name):
    path = ROOT / "configs" / f"{name}.yaml"
    assert path.read_text().startswith(f"# samaritan compare configs/{name}.yaml --data DIR\n")
    comparison = load_comparison(path)
    assert comparison.name == name
    configs = [seeds[min(seeds)] for seeds in comparison.configs.values()]
    differences = [config_differences(configs[0], config) for config in configs[1:]]
    assert all(differences)
    assert len({str(found) for found in differences}) == len(differences)


# Real runs.

VARIANTS = {
    "reference": {},
    "broken": {"peft.ranks": {"nothing": 3}},
    "small": {"strategy": "ffa", "peft.rank": 1, "rounds": 2},
}


@pytest.fixture(scope="module")
def compared(written, tmp_path_factory):
    """A comparison that ran once: its file, its folder, and its table."""
    path = written(variants=VARIANTS, rounds=1, evaluation={"every_rounds": 2})
    out = tmp_path_factory.mktemp("runs") / "compared"
    return path, out, compare(load_comparison(path), out, command="samaritan compare x.yaml")


@pytest.fixture
def copied(compared, tmp_path):
    path, out, table = compared
    shutil.copytree(out, tmp_path / "copy")
    return path, tmp_path / "copy", table


def summary_of(out, variant):
    return json.loads((out / variant / "seed-0" / "summary.json").read_text())


def row_of(table, variant):
    return next(row for row in table["variants"] if row["variant"] == variant)


def test_each_run_is_an_ordinary_run_folder(compared):
    path, out, _ = compared
    for variant in ("reference", "small"):
        folder = out / variant / "seed-0"
        names = {p.name for p in folder.iterdir()}
        assert {
            "config.yaml", "events.jsonl", "summary.json", "report.html", "adapter", "checkpoints"
        } <= names  # fmt: skip
        assert load_config(folder / "config.yaml") == load_comparison(path).configs[variant][0]


def test_a_failing_variant_is_told_and_the_others_run(compared):
    _, out, table = compared
    assert [row["variant"] for row in table["variants"]] == list(VARIANTS)
    row = row_of(table, "broken")
    (entry,) = row["seeds"]
    assert entry["error"]["code"] == "SAM-C207"
    assert "nothing" in entry["error"]["message"]
    assert {value for key, value in row.items() if key not in ("variant", "seeds")} == {None}
    text = (out / "comparison.md").read_text()
    assert "| broken | failed: SAM-C207 | – |" in text
    assert "- broken, seed 0: SAM-C207, peft.ranks names 'nothing'" in text
    assert row_of(table, "small")["dice"] is not None


def test_numbers_are_those_of_the_summaries(compared):
    _, out, table = compared
    reference = summary_of(out, "reference")
    for variant in ("reference", "small"):
        summary, row = summary_of(out, variant), row_of(table, variant)
        answers = [site for entry in summary["rounds"] for site in entry["sites"].values()]
        up = sum(site["bytes_up"] for site in answers) / len(answers)
        down = sum(site["bytes_down"] for site in answers) / len(answers)
        assert row["dice"] == summary["final"]["dice_mean"]
        assert row["hd95_mm"] == summary["final"]["hd95_mm_mean"]
        assert row["nsd"] == summary["final"]["nsd_mean"]
        assert row["bytes_up"] == pytest.approx(up)
        assert row["bytes_down"] == pytest.approx(down)
        assert row["bytes_round_trip"] == pytest.approx(up + down)
        assert row["federated_seconds"] == summary["cost"]["federated_seconds"]
        difference = summary["final"]["dice_mean"] - reference["final"]["dice_mean"]
        assert row["dice_difference"] == pytest.approx(difference)
    assert row_of(table, "reference")["round_trip_factor"] == 1
    assert row_of(table, "small")["round_trip_factor"] > 1


def test_the_files_say_what_the_call_returned(compared):
    _, out, table = compared
    assert json.loads((out / "comparison.json").read_text()) == table
    assert (out / "comparison.md").read_text() == to_markdown(table)
    assert "Made by `samaritan compare x.yaml` with Samaritan" in to_markdown(table)
    assert (out / "comparison.svg").read_text().rstrip().endswith("</svg>")
    assert matplotlib.image.imread(out / "comparison.png").ndim == 3


def test_resume_keeps_what_is_finished_and_goes_on_with_the_rest(copied, monkeypatch):
    path, out, table = copied
    stopped = out / "small" / "seed-0"
    events = (stopped / "events.jsonl").read_text().splitlines()
    assert '"summary_written"' in events.pop()
    (stopped / "events.jsonl").write_text("\n".join(events) + "\n")  # killed just before its end
    (stopped / "checkpoints" / "round_00002.safetensors").unlink()
    before = {p: p.stat().st_mtime_ns for p in (out / "reference").rglob("*")}
    noted = []
    again = compare(
        load_comparison(path),
        out,
        resume=True,
        command="samaritan compare x.yaml",
        run_done=lambda variant, seed, ended: noted.append((variant, seed, type(ended))),
    )
    assert {p: p.stat().st_mtime_ns for p in (out / "reference").rglob("*")} == before
    assert noted == [("reference", 0, dict), ("broken", 0, Failure), ("small", 0, dict)]
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    starts = [event["first_round"] for event in events if event["event"] == "run_started"]
    assert starts == [1, 2]
    assert [row["dice"] for row in again["variants"]] == [row["dice"] for row in table["variants"]]


def test_resume_refuses_other_settings_before_anything_runs(copied, written):
    _, out, _ = copied
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    changed = written(variants={"new": {}} | VARIANTS, rounds=1, evaluation={"every_rounds": 1})
    with pytest.raises(ConfigError, match="every_rounds: 2 -> 1") as caught:
        compare(load_comparison(changed), out, resume=True)
    assert caught.value.code == "SAM-C302"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_runs_that_are_there_are_not_touched_without_resume(copied):
    path, out, _ = copied
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(StorageError) as caught:
        compare(load_comparison(path), out)
    assert caught.value.code == "SAM-S106"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_no_variant_runs_when_one_has_a_name_that_nothing_goes_by(written, tmp_path):
    path = written(variants={"a": {}, "b": {"strategy": "fedavgg"}})
    with pytest.raises(ConfigError, match="fedavgg"):
        compare(load_comparison(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_nobody_named_are_missed_before_any_run(samaritan, written, tmp_path):
    path = written(variants={"a": {}, "b": {}}, data={"source": "folder"})
    done = samaritan("compare", path, "--out", tmp_path / "out")
    assert done.code == 1
    assert "SAM-C303" in done.err
    assert not (tmp_path / "out").exists()


# The command.


def test_json_is_the_table_alone_and_a_failure_is_exit_code_1(samaritan, copied):
    path, out, table = copied
    done = samaritan("compare", path, "--out", out, "--resume", "--json")
    found = json.loads(done.out)
    command = f"samaritan compare {path}"
    assert found == table | {"command": command, "date": found["date"]}
    assert found == json.loads((out / "comparison.json").read_text())
    assert done.code == 1
    error = done.err[done.err.index("error: ") :].splitlines()
    assert error[0] == "error: 1 of 3 runs failed: broken seed 0 (SAM-C207)"
    assert error[1].startswith("  hint: ")
    assert "reference, seed 0: Dice " in done.err


def test_the_command_prints_the_table_and_where_it_is(samaritan, copied, written):
    _, out, _ = copied
    sound = {name: VARIANTS[name] for name in ("reference", "small")}
    path = written(variants=sound, rounds=1, evaluation={"every_rounds": 2})
    done = samaritan("compare", path, "--out", out, "--resume", "--set", "name=small")
    assert done.code == 0, done.err
    assert (out / "comparison.md").read_text() in done.out
    assert f"Made by `samaritan compare {path} --set name=small` with" in done.out
    assert done.out.splitlines()[-1] == f"table: {out / 'comparison.md'}"
    assert "broken" not in done.out


def test_resume_needs_out(samaritan, written):
    done = samaritan("compare", written(variants={"a": {}}), "--resume")
    assert done.code == 1
    assert "SAM-C305" in done.err


# Made-up summaries.


def made_up(dice, up=1000, down=3000, error=None, rounds=3, oracle="none"):
    """A summary of two sites that trained, one that failed and one that only scored."""
    sites = {
        "A": {"bytes_up": up, "bytes_down": down, "train_loss": 0.1, "status": "ok"},
        "B": {"bytes_up": up + 20, "bytes_down": down, "train_loss": 0.1, "status": "ok"},
        "C": {"bytes_up": 7, "bytes_down": down, "train_loss": None, "status": "failed: SAM-T101"},
        "D": {"bytes_up": 9, "bytes_down": down // 2, "train_loss": None, "status": "ok"},
        "E": {"bytes_up": 9, "bytes_down": 9, "train_loss": 0.1, "status": "failed: SAM-T101"},
    }
    return {
        "sites": {site: {} for site in sites},
        "rounds": [
            {
                "round": n, "dice_mean": dice * n / rounds if n != 2 else None, "sites": sites,
                "aggregation_error": error and error * n, "aggregation_seconds": 0.1 * n,
            }
            for n in range(1, rounds + 1)
        ],
        "final": {"dice_mean": dice, "hd95_mm_mean": 2.0, "cases": 27, "oracle_prompts": oracle},
        "cost": {"federated_seconds": 60.0, "hardware": "a machine"},
        "data": {"note": "Made up.", "pseudo_sites": True},
    }  # fmt: skip


def table_of(results):
    return {
        "samaritan": "0.1.0", "name": "made-up", "command": "samaritan compare it",
        "date": "2026-11-22", **circumstances(results), "variants": compare_runs(results),
    }  # fmt: skip


def test_seeds_are_compared_with_the_reference_of_the_same_seed():
    rows = compare_runs(
        {
            "reference": {0: made_up(0.80), 1: made_up(0.70), 2: Failure("SAM-F201", "lost")},
            "other": {0: made_up(0.82), 1: made_up(0.71), 2: made_up(0.10)},
        }
    )
    assert rows[0]["dice"] == pytest.approx(0.75)
    assert rows[0]["dice_range"] == [0.70, 0.80]
    assert rows[1]["dice"] == pytest.approx((0.82 + 0.71 + 0.10) / 3)
    assert rows[1]["dice_difference"] == pytest.approx((0.02 + 0.01) / 2)


def test_bytes_are_of_the_sites_that_trained_and_errors_of_rounds():
    rows = compare_runs(
        {"a": {0: made_up(0.8)}, "b": {0: made_up(0.8, up=90, down=100, error=0.01)}}
    )
    assert (rows[0]["bytes_up"], rows[0]["bytes_down"]) == (1010, 3000)
    assert rows[0]["aggregation_error"] is None
    assert rows[1]["aggregation_error"] == pytest.approx(0.02)
    assert rows[1]["aggregation_seconds"] == pytest.approx(0.2)
    assert rows[1]["round_trip_factor"] == pytest.approx(4010 / 200)


def test_the_table_shows_the_range_and_the_seeds_that_failed():
    text = to_markdown(
        table_of(
            {
                "a": {0: made_up(0.8), 1: made_up(0.7)},
                "b": {0: made_up(0.79, up=10, down=20), 1: Failure("SAM-F201", "one\n  two")},
            }
        )
    )
    lines = text.splitlines()
    assert lines[0] == "# made-up: 2 variants compared"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert {len(row) for row in cells} == {11}
    assert cells[2][:3] == ["a", "0.7500 (0.7000–0.8000)", "0.0000"]
    assert cells[3] == [
        "b", "0.7900; 1 of 2 failed: SAM-F201", "−0.0100", "2.00", "–", "20 B", "20 B", "40 B",
        "100.2×", "1 min 00 s", "200 ms",
    ]  # fmt: skip
    assert "- b, seed 1: SAM-F201, one two" in lines
    assert "seeds 0, 1, 5 pseudo-sites, 27 validation cases; a machine." in text
    assert "Made up." in lines


def test_oracle_prompts_are_marked_in_table_and_plot(tmp_path):
    table = table_of({"a": {0: made_up(0.8, oracle="box")}})
    assert "| Dice (oracle prompts: boxes from the true labels) |" in to_markdown(table)
    write_plot(tmp_path, table)
    assert "oracle prompts: boxes" in (tmp_path / "comparison.svg").read_text()


def test_a_comparison_in_which_all_failed_has_a_table_and_no_plot(tmp_path):
    (tmp_path / "comparison.svg").write_text("of a former time")
    table = table_of({"a": {0: Failure("KeyError", "'b'")}})
    assert write_plot(tmp_path, table) == []
    assert list(tmp_path.iterdir()) == []
    assert "| a | failed: KeyError |" in to_markdown(table)


# The plot.


def placed_names(svg):
    """Every text of the figure with its place: ``{name: [(x, y), ...]}``."""
    found = {}
    for element in ElementTree.fromstring(svg.read_text()).iter():  # noqa: S314
        if element.tag.endswith("}text") and element.text:
            numbers = element.get("x"), element.get("y")
            if None in numbers:
                place = element.get("transform").partition("translate(")[2].partition(")")[0]
                numbers = place.replace(",", " ").split()
            found.setdefault(element.text, []).append(tuple(map(float, numbers)))
    return found


def test_twenty_variants_of_one_size_and_score_are_named_without_overlap(tmp_path):
    results = {f"variant-{n:02d}": {0: made_up(0.8 - n / 1e5)} for n in range(20)}
    results["far-below"] = {0: made_up(0.3)}  # so that the others lie within a line's height
    write_plot(tmp_path, table_of(results))
    names = placed_names(tmp_path / "comparison.svg")
    for panel in (0, 1):
        places = [sorted(names[name])[panel] for name in results]
        heights = sorted(y for _, y in places)
        assert len({x for x, _ in places}) == 1
        assert min(np.diff(heights)) > 9  # points; letters are 8.5 high
        assert [y for _, y in places] == heights  # the best is on top, where y is smallest


def test_names_of_places_far_apart_stand_beside_them(tmp_path):
    sizes = {"tiny": 10, "small": 1000, "large": 100_000}
    write_plot(tmp_path, table_of({n: {0: made_up(0.8, s, s)} for n, s in sizes.items()}))
    names = placed_names(tmp_path / "comparison.svg")
    left = [min(names[name]) for name in sizes]
    assert np.ptp([y for _, y in left]) < 1
    assert all(np.diff([x for x, _ in left]) > 60)


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path):
    table = table_of({"a": {0: made_up(0.8), 1: made_up(0.7)}, "b": {0: made_up(0.75)}})
    for name in ("one", "two"):
        write_plot(tmp_path / name, table)
    for file in ("comparison.svg", "comparison.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_curve_is_the_mean_of_the_seeds_over_scored_rounds():
    (row,) = compare_runs({"a": {0: made_up(0.9), 1: made_up(0.6), 2: Failure("SAM-F201", "")}})
    assert mean_curve(row) == [(1, pytest.approx(0.25)), (3, pytest.approx(0.75))]


def test_spread_moves_as_little_as_it_can():
    assert spread([0, 50, 100], 10, 0, 100) == [0, 50, 100]
    assert spread([50, 50, 50], 10, 0, 100) == [40, 50, 60]
    assert spread([0, 0], 10, 0, 100) == [0, 10]
    assert spread([100, 100], 10, 0, 100) == [90, 100]
    crowded = spread([5.0] * 30, 10, 0, 100)
    assert np.diff(crowded) == pytest.approx(10)
    assert math.isclose(crowded[0], 0)
