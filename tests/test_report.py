"""The report: made-up run folders, from the usual to the hostile, and a real browser."""

import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from samaritan.cli.simulate import _result_line, round_line
from samaritan.config import parse_config
from samaritan.errors import DataError, StorageError
from samaritan.privacy.budget import Budget
from samaritan.privacy.plan import privacy_plan
from samaritan.report import aggregation, facts, plots, privacy, trouble, units
from samaritan.report.html import write_report
from samaritan.report.overlay import draw_overlay
from samaritan.shares import SHARING
from simulation.engines import run_in_process
from simulation.privacy import SERVER, privacy_results

HOSTILE = '<script>alert("x")</script> $\\frac{ "\' & --> ]]> javascript:alert(1)'
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


# ---- made-up run folders ---------------------------------------------------------------------


def make_cases(sites, classes, count, seed=0):
    """Count cases, dealt to the sites in turn; a class is now and then absent."""
    generator = np.random.default_rng(seed)
    cases = []
    for index in range(count):
        site = sites[index % len(sites)]
        scores = {}
        for name in classes:
            dice = float(np.clip(generator.normal(0.87, 0.035), 0, 1))
            absent = generator.random() < 0.02
            scores[name] = {
                "dice": None if absent else dice,
                "hd95_mm": None if absent else float(6 * (1 - dice) + generator.random()),
                "nsd": None if absent else min(1.0, dice + 0.08),
            }
        known = [entry["dice"] for entry in scores.values() if entry["dice"] is not None]
        cases.append(
            {
                "case_id": f"hippocampus_{index:03d}",
                "site": site,
                "subject_id": f"s{index:03d}",
                "scores": scores,
                "dice_mean": float(np.mean(known)) if known else None,
            }
        )
    return cases


def make_summary(
    sites=("A", "B", "C", "D"), classes=("anterior", "posterior"), rounds=12, cases=27
):
    """A summary as a finished simulation writes it, and its cases."""
    generator = np.random.default_rng(1)
    case_list = make_cases(sites, classes, cases)
    per_site = {
        site: facts.mean(facts.case_values(facts.cases_of(case_list, site))) for site in sites
    }
    ceilings = {site: (per_site[site] or 0.86) for site in sites}
    entries = [
        {
            "round": 0,
            "seconds": 8.1,
            "dice_mean": 0.021,
            "sites": {s: {"dice": 0.02} for s in sites},
        }
    ]
    for number in range(1, rounds + 1):
        answers = {
            site: {
                "train_loss": float(1.1 * np.exp(-number / 4) + 0.12 + generator.normal(0, 0.015)),
                "dice": float(
                    ceilings[site] * (1 - np.exp(-number / 2.2)) + generator.normal(0, 0.006)
                ),
                "bytes_up": 422_912 + 16 * index,
                "bytes_down": 424_000,
                "seconds": 6.5 + index,
                "status": "ok",
            }
            for index, site in enumerate(sites)
        }
        dice = float(np.mean([answer["dice"] for answer in answers.values()]))
        entries.append({"round": number, "seconds": 33.0, "dice_mean": dice, "sites": answers})
    final_dice = facts.mean(facts.case_values(case_list))
    summary = {
        "samaritan": "0.1.0", "config_sha256": "9f" * 32, "seed": 0, "engine": "inprocess",
        "base": {
            "name": "vit_b", "sha256": "ec" * 32, "parameters": 93_735_472, "note": "official",
        },
        "peft": {"preset": "flap-sam", "rank": 8, "trainable_parameters": 104_448},
        "strategy": "svd",
        "sites": {
            site: {
                "train_cases": 40 + index, "train_subjects": 40 + index,
                "val_cases": len(facts.cases_of(case_list, site)),
            }
            for index, site in enumerate(sites)
        },
        "rounds": entries,
        "final": {
            "dice_mean": final_dice,
            "dice_per_class": {
                name: facts.mean(facts.class_values(case_list, name)) for name in classes
            },
            "hd95_mm_mean": facts.mean(facts.case_values(case_list, "hd95_mm")),
            "nsd_mean": facts.mean(facts.case_values(case_list, "nsd")),
            "dice_per_site": per_site,
            "cases": cases, "excluded_cases": 0, "nsd_tolerance_mm": 1.0,
        },
        "baselines": {
            "local_only": {
                "dice_mean": final_dice - 0.041,
                "dice_per_site": {
                    site: dice - 0.02 - 0.04 * generator.random()
                    for site, dice in per_site.items() if dice
                },
                "steps": 960, "seconds": 390.0,
            },
            "centralised": {"dice_mean": final_dice + 0.008, "steps": 960, "seconds": 377.0},
            "unet": {
                "dice_mean": final_dice - 0.012, "parameters": 1_626_072,
                "note": "MONAI U-Net, same steps", "steps": 960, "seconds": 201.0,
            },
        },
        "cost": {
            "wall_seconds": 1512.4, "peak_rss_bytes": 3_410_000_000, "bytes_up": 20_300_000,
            "bytes_down": 20_352_000, "frozen_base_copies": 1,
            "hardware": "2 × AMD EPYC, 8 GiB, no GPU", "overhead_seconds_per_round": 0.21,
        },
        "privacy": None,
        "data": {
            "name": "MSD Task04 Hippocampus", "pseudo_sites": True,
            "classes": {"background": 0} | {name: value for value, name in enumerate(classes, 1)},
            "note": "One hospital’s data, split by person.",
        },
    }  # fmt: skip
    return summary, case_list


def make_volumes(seed=0):
    """A head-like image (X, Y, Z) in RAS with two touching structures, and a shifted prediction."""
    generator = np.random.default_rng(seed)
    x, y, z = np.meshgrid(np.arange(40), np.arange(52), np.arange(36), indexing="ij")
    long_axis = ((x - 24) / 6) ** 2 + ((y - 26) / 15) ** 2 + ((z - 17) / 7) ** 2
    label = np.where(long_axis < 1, np.where(y > 26, 1, 2), 0)
    prediction = np.roll(label, (1, 1, 0), axis=(0, 1, 2))
    image = 80 + 40 * (long_axis < 1) + 10 * np.sin(x / 3) + generator.normal(0, 8, x.shape)
    return image, label, prediction


def write_run(folder, summary, cases=None, overlays=False):
    """Write the files of a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "config.yaml").write_text(
        "rounds: 12\nseed: 0\npeft:\n  preset: flap-sam\n", encoding="utf-8"
    )
    if cases is not None:
        (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    if overlays:
        entries = []
        for index, kind in enumerate(("worst", "median", "best")):
            classes = {"anterior": 1, "posterior": 2}
            draw_overlay(
                folder / f"overlays/{kind}.png",
                *make_volumes(index),
                (1.0, 1.0, 1.0),
                classes,
                f"{kind} case",
            )
            entries.append(
                {
                    "file": f"overlays/{kind}.png",
                    "title": f"{kind.capitalize()} case",
                    "case_id": f"hippocampus_{index:03d}",
                    "site": "A",
                    "dice": 0.8 + index / 20,
                }
            )
        (folder / "overlays.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def usual_run(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("runs") / "hippocampus-4x12", *make_summary(), overlays=True
    )


def without(summary, *keys):
    """A copy without the entry at a path of keys."""
    copied = copy.deepcopy(summary)
    target = copied
    for key in keys[:-1]:
        target = target[key]
    target.pop(keys[-1])
    return copied


# ---- reading a page --------------------------------------------------------------------------


class Page(HTMLParser):
    """The text, elements and attributes of a page."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, html):
        super().__init__()
        self.elements, self.chunks, self.open, self.faults = [], [], [], []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.chunks).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.chunks.append(data)


def assert_sound(html):
    """The page is well formed, has unique ids, runs nothing and refers to nothing outside it."""
    page = Page(html)
    assert not page.faults
    assert not page.open
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form"}
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name)
                assert not value.startswith("#") or value[1:] in ids
            if name in {"style", "clip-path", "fill", "stroke"}:
                assert all(target in ids for target in re.findall(r"url\(#([^)]*)\)", value))
                assert "url(" not in re.sub(r"url\(#[^)]*\)", "", value)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "nan mm" not in page.text.lower()
    assert not any(
        value in {"nan", "inf"} for _, attrs in page.elements for value in attrs.values()
    )
    assert "None" not in page.text
    claims = re.sub(r"secure (aggregation|sum)\b", "", page.text.lower())  # names of the method
    for claim in ("compliant", "anonymous", "secure"):
        assert not re.search(rf"\b{claim}\b", claims)
    return page


def report(folder, summary, cases=None, **options):
    """Write a run folder and its report, check it and give back the page."""
    path = write_report(write_run(folder, summary, cases, **options))
    return assert_sound(path.read_text(encoding="utf-8"))


# ---- the usual report ------------------------------------------------------------------------


def test_states_the_result_and_every_part(usual_run):
    page = assert_sound(write_report(usual_run).read_text(encoding="utf-8"))
    summary = json.loads((usual_run / "summary.json").read_text())
    dice = summary["final"]["dice_mean"]
    assert (
        "Four pseudo-sites trained one adapter for 12 rounds: "
        f"mean 3-D Dice {dice:.2f} over 27 validation volumes." in page.text
    )
    assert (
        "0.041 above sites training alone, 0.008 below centralised training "
        "and 0.012 above the U-Net" in page.text
    )
    for heading in ("Learning curves", "Final scores", "Comparison with the baselines", "Examples",
                    "Traffic", "Trouble", "Settings and environment", "Privacy",
                    "How the scores are counted"):  # fmt: skip
        assert heading in page.text
    assert f"{dice:.3f}" in page.text
    assert "104 448" in page.text
    assert "0.11 % of the base" in page.text
    assert "Every site that was asked answered." in page.text
    assert "used no differential privacy and no secure aggregation" in page.text
    assert "The sites are pseudo-sites" in page.text
    assert "What sites keep" not in page.text
    assert "ot labelled" not in page.text
    assert "ggregation error" not in page.text
    assert "preset: flap-sam" in page.text
    assert sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in page.elements) == 7
    assert sum(tag == "img" for tag, _ in page.elements) == 3


def test_is_the_same_page_for_the_same_run(usual_run):
    first = write_report(usual_run).read_bytes()
    assert write_report(usual_run).read_bytes() == first


def test_leaves_no_temporary_file(usual_run):
    write_report(usual_run)
    assert not list(usual_run.glob(".*"))


def test_says_that_the_tiny_base_is_no_foundation_model(tmp_path):
    summary, cases = make_summary()
    summary["base"] = {"name": "tiny", "sha256": "00", "parameters": 120_000}
    assert "randomly initialised miniature" in report(tmp_path / "tiny", summary, cases).text


# ---- what may be missing or odd --------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [("cost",), ("data",), ("final",), ("sites",), ("rounds",), ("peft",), ("base",),
     ("final", "dice_per_site"), ("final", "dice_per_class"), ("baselines", "local_only"),
     ("baselines", "unet"), ("cost", "peak_rss_bytes")],
    ids=".".join,
)  # fmt: skip
def test_stands_a_missing_entry(tmp_path, keys):
    summary, cases = make_summary(rounds=2, cases=8)
    report(tmp_path / "run", without(summary, *keys), cases)


@pytest.mark.parametrize("value", [None, [], "text", 3, {}], ids=repr)
def test_stands_entries_of_the_wrong_kind(tmp_path, value):
    summary, cases = make_summary(rounds=2, cases=8)
    for key in ("baselines", "cost", "data", "peft", "base", "privacy", "engine"):
        summary[key] = value
    summary["rounds"][1]["sites"] = value
    summary["final"]["dice_per_site"] = value
    cases[0]["scores"] = value
    report(tmp_path / "run", summary, cases)
    report(tmp_path / "bare", dict.fromkeys(("sites", "rounds", "final", "name", "seed"), value))


def test_stands_an_empty_summary(tmp_path):
    page = report(tmp_path / "run", {})
    assert "No sites took part; no round of training is recorded." in page.text


def test_without_baselines_cases_or_overlays_says_so(tmp_path):
    summary, _ = make_summary()
    page = report(tmp_path / "run", summary | {"baselines": None})
    assert "No baseline was trained" in page.text
    assert "no scores of single cases" in page.text
    assert "no pictures of cases" in page.text


def test_one_site_one_round(tmp_path):
    summary, cases = make_summary(sites=("Solo",), rounds=1, cases=3)
    summary["data"]["pseudo_sites"] = False
    page = report(tmp_path / "run", summary, cases)
    assert "One site trained one adapter for 1 round: mean 3-D Dice" in page.text
    assert "All sites" not in page.text


def test_without_any_dice(tmp_path):
    summary, cases = make_summary(cases=8)
    for entry in summary["rounds"]:
        entry["dice_mean"] = None
        for answer in entry["sites"].values():
            answer["dice"] = None
    summary["final"] = {
        "dice_mean": None,
        "dice_per_class": {"anterior": None},
        "dice_per_site": {"A": None},
        "cases": 0,
    }
    for case in cases:
        case["dice_mean"] = None
        case["scores"] = {
            name: {"dice": None, "hd95_mm": None, "nsd": None} for name in case["scores"]
        }
    page = report(tmp_path / "run", summary, cases)
    assert "no validation case could be scored" in page.text
    assert "No Dice was recorded by round." in page.text


def test_rounds_that_were_not_evaluated_leave_a_line(tmp_path):
    summary, _ = make_summary(rounds=6)
    for entry in summary["rounds"][1::2]:
        entry["dice_mean"] = None
    assert facts.mean_series(summary)[0] == [0, 2, 4, 6]
    report(tmp_path / "run", summary)


def test_many_sites(tmp_path):
    sites = tuple(f"Hospital {index:02d}" for index in range(64))
    page = report(tmp_path / "run", *make_summary(sites=sites, cases=256))
    assert "64 pseudo-sites" in page.text
    assert "the other 62 sites" in page.text
    assert all(site in page.text for site in sites)


def test_many_classes_and_many_cases(tmp_path):
    classes = tuple(f"structure {index}" for index in range(41))
    page = report(tmp_path / "run", *make_summary(classes=classes, cases=120))
    assert "shows only the outliers" in page.text
    assert "By class (all sites)" in page.text


@pytest.mark.parametrize(
    "names",
    [(HOSTILE, "Universitätsklinikum " * 12, "_hidden", "医院 🏥", ""),
     ("{{ 7*7 }}", "a\nb\tc", "x\x00\x1b[31m", "\ud800", "\\"),
     ("$x$", "\u202egnp.exe", "\ufffe", "nan", "]]>")],
    ids=["hostile", "control", "markup"],
)  # fmt: skip
def test_untrusted_names_stay_text(tmp_path, names):
    summary, cases = make_summary(sites=names, classes=names, rounds=2, cases=12)
    first = names[0]
    for entry in summary["rounds"][1:]:
        for name in names:
            entry["sites"][name]["status"] = name
    for index, case in enumerate(cases):
        case["case_id"] = names[index % len(names)]
    summary["data"] |= {"name": first, "note": first}
    for key in ("strategy", "config_sha256", "engine"):
        summary[key] = first
    summary["base"]["name"] = first
    summary["peft"]["preset"] = first
    summary["baselines"]["local_only"]["note"] = first
    summary["baselines"][first] = {"dice_mean": 0.5, "note": first}
    summary["privacy"] = {
        "unit": "patient", "statement": first, "warnings": list(names), "scores": first,
        "sites": {name: {"epsilon": 1.0, "budget": name} for name in names},
    }  # fmt: skip
    summary["environment"] = {name: name for name in names}
    page = report(tmp_path / "run", summary, cases)
    assert page.text.count(first) >= 8
    assert not set(page.text) & set("\x00\x1b\u202e\ufffe")


def test_untrusted_run_name_stays_text(tmp_path):
    page = report(tmp_path / "<img src=x onerror=alert(1)>", *make_summary(rounds=1, cases=4))
    assert "<img src=x onerror=alert(1)>" in page.text


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    summary, cases = make_summary(rounds=3, cases=8)
    summary["rounds"][2]["sites"]["A"]["train_loss"] = float("nan")
    summary["final"]["hd95_mm_mean"] = float("inf")
    cases[0]["scores"]["anterior"]["hd95_mm"] = float("inf")
    report(tmp_path / "run", summary, cases)


def test_lists_what_went_wrong_with_rounds_and_sites(tmp_path):
    summary, cases = make_summary()
    for number in (3, 4, 5, 9):
        summary["rounds"][number]["sites"]["B"] = {"status": "failed: SAM-D104"}
    del summary["rounds"][7]["sites"]["C"]
    page = report(tmp_path / "run", summary, cases)
    assert "3–5, 9 B failed: SAM-D104" in page.text
    assert "for 1 pair of site and round" in page.text
    assert "asked answered" not in page.text
    assert "11 / 11" in page.text  # C was not asked in round 7


# ---- privacy ---------------------------------------------------------------------------------


def private(tmp_path, unit="patient", masked=False, rounds=3, **keys):
    """A summary as a run with privacy writes it, without much to draw; its ledgers are empty."""
    sites = ("A", "B", "C")
    summary = make_summary(sites=sites, rounds=rounds, cases=6)[0] | {"baselines": None}
    tree = {"epsilon": 30, "records": 40, "noise_multiplier": 1.0, "sampling_rate": 0.5}
    settings = {"unit": unit} | (tree if unit != "none" else {}) | keys
    config = parse_config(
        {"strategy": "ffa", "privacy": settings, "federation": {"secure_aggregation": masked}}
    )
    budgets = {
        site: Budget(config, privacy_plan(config, site), tmp_path / "ledgers" / site, ("p",))
        for site in ([] if unit == "none" else [SERVER] if unit == "site" else sites)
    }
    summary["privacy"] = privacy_results(config, budgets, 1000)
    for entry in summary["privacy"].get("sites", {}).values():
        entry["epsilon"] = 8.1051661
    hidden = unit != "none" and keys.get("scores") != "declared"
    summary["rounds"] = summary["rounds"][1:]
    for entry in summary["rounds"]:
        entry["dice_mean"] = None if hidden else 0.5
        for answer in entry["sites"].values():
            answer["update_sha256"] = "" if unit == "site" else "ab" * 32
            if unit != "none":
                answer["train_loss"] = None
            if hidden:
                answer["dice"] = None
    return summary


def handed(page):
    """The list of what each site handed to the server."""
    return page.text.split("would send in a deployment: ")[1].split(". Images")[0]


def test_the_guarantee_comes_first_and_every_site_has_a_line(tmp_path):
    page = report(tmp_path / "run", private(tmp_path))
    _, section = page.text.split(" Privacy Guarantee: ")
    assert section.startswith("epsilon at most 30 at delta 1 × 10⁻⁵ for one patient of a site")
    assert "What the patients of each site may give away" in section
    for site in "ABC":
        assert f"{site} 8.11 30 27 % 1 × 10⁻⁵ 40 1 0.5 20" in section  # rounded up
    assert "no differential privacy" not in page.text


def test_a_bound_is_never_rounded_down(tmp_path):
    summary = private(tmp_path)
    found = []
    for epsilon in (8.1, 8.100001, 8.109999, 0.0):
        summary["privacy"]["sites"]["A"]["epsilon"] = epsilon
        found.append(privacy.spending_rows(summary)[0].epsilon)
    assert found == ["8.10", "8.11", "8.11", "0.00"]


def test_a_guarantee_of_one_site_is_not_told_as_that_of_all(tmp_path):
    summary = private(tmp_path, records={"A": 40, "B": 70, "C": 40})
    page = report(tmp_path / "run", summary)
    assert (
        "Guarantee at the site where it is weakest, with the others in the table: epsilon"
        in page.text
    )
    assert "of 40 published patients" in page.text


def test_the_warnings_of_a_run_are_a_list(tmp_path):
    summary = private(tmp_path, scores="declared")
    page = report(tmp_path / "run", summary)
    assert len(summary["privacy"]["warnings"]) >= 2
    told = page.text.split("The run was warned: ")[1]
    assert told.startswith(" ".join(summary["privacy"]["warnings"]))


def test_withheld_scores_are_said_to_be_and_leave_no_plot(tmp_path):
    page = report(tmp_path / "run", private(tmp_path))
    assert "There is no Dice by round: the sites withheld their scores." in page.text
    assert "There is no training loss: under differential privacy no record" in page.text
    assert "The sites withheld their validation scores from the server." in page.text
    assert "made by the simulation, which has all the data: they are outside the guarantee" in (
        page.text
    )
    assert handed(page).endswith(
        "the published number of records and the planned steps; no count of its data; the number "
        "and hash of the last entry in its privacy ledger; no training loss and no validation "
        "score; where something failed, the code of the error"
    )
    assert "can carry about one patient is what the guarantee bounds" in page.text


def test_declared_scores_are_said_to_be_outside_the_guarantee(tmp_path):
    page = report(tmp_path / "run", private(tmp_path, scores="declared"))
    assert "The sites declared their validation scores to the server, without noise" in page.text
    assert "Dice of the shared adapter on each site’s validation cases" in page.text
    assert "validation scores and the number of validation cases; no training loss" in handed(page)
    assert "withheld" not in page.text


def test_of_a_run_that_is_no_simulation_none_is_said_to_have_scored(tmp_path):
    summary = private(tmp_path)
    page = report(tmp_path / "run", summary | {"engine": "deployment"})
    assert "made by the simulation" not in page.text


@pytest.mark.parametrize(
    ("unit", "masked", "told", "update"),
    [
        ("patient", False, "off: the server saw each site’s update, with its noise", "alone, in"),
        ("slice", False, "off: the server saw each site’s update, with its noise", "alone, in"),
        ("patient", True, "on: each site sent its update under masks", "alone, under masks, in"),
        ("site", False, "takes a server that is trusted", "trained numbers), in"),
        ("none", True, "secure aggregation and no differential privacy", "), under masks, in"),
    ],
)
def test_what_the_server_saw_of_an_update_is_said_plainly(tmp_path, unit, masked, told, update):
    page = report(tmp_path / "run", private(tmp_path, unit, masked))
    assert told in page.text
    assert ("the server saw sums only and no update of a single site" in page.text) == masked
    assert f"{update} messages of 413 KiB on average" in handed(page)
    assert ("public keys, sealed shares" in handed(page)) == masked
    noisy = unit in ("patient", "slice")
    assert ("noisy gradients" in handed(page)) == ("no count of its data" in handed(page)) == noisy
    assert ("counts of cases and training examples" in handed(page)) != noisy


def test_sums_alone_have_no_guarantee_and_no_table(tmp_path):
    page = report(tmp_path / "run", private(tmp_path, "none", masked=True))
    assert "Nothing bounds what the sums, and the adapter, reveal about single patients" in (
        page.text
    )
    assert handed(page).endswith("scores: training loss and validation metrics")
    assert "Guarantee" not in page.text
    assert "Epsilon spent" not in page.text
    assert "and can carry information about them" in page.text


def test_with_a_site_as_the_unit_there_is_one_line_for_all(tmp_path):
    page = report(tmp_path / "run", private(tmp_path, "site"))
    assert "What all sites together may give away" in page.text
    assert "all sites 8.11 30 27 %" in page.text
    assert handed(page).endswith(
        "the training loss; no validation score; where something failed, the code of the error"
    )


@pytest.mark.parametrize(
    ("unit", "masked", "why"),
    [
        ("patient", True, "it takes every site’s update, and the server saw sums only"),
        ("site", False, "the noise does not cover it, so that no record of it is kept"),
        ("patient", False, ""),
    ],
)
def test_an_error_that_privacy_hides_is_not_put_down_to_the_strategy(tmp_path, unit, masked, why):
    summary = private(tmp_path, unit, masked)
    for entry in summary["rounds"]:
        entry["aggregation_error"] = None
    page = report(tmp_path / "run", summary)
    assert (f"The aggregation error is not known: {why}." in page.text) == bool(why)
    assert ("no product BA can be formed" in page.text) != bool(why)


def test_a_site_without_budget_left_and_a_ledger_that_was_restored_is_doubted(tmp_path):
    summary = private(tmp_path)
    summary["rounds"][1]["sites"]["B"]["status"] = "failed: SAM-P101"
    del summary["rounds"][2]["sites"]["B"]
    for entry in summary["rounds"][1:]:
        entry["sites"]["C"]["status"] = "failed: SAM-P103"
    page = report(tmp_path / "run", summary)
    assert "B left before the end: another round would have exceeded its budget." in page.text
    assert "C did not train to the end: its ledger was older than what the server had seen" in (
        page.text
    )
    assert "What was spent there can be more than the table says." in page.text
    assert "2 B left: privacy budget spent" in page.text
    assert "2–3 C refused to train: its privacy ledger was rolled back (SAM-P103)" in page.text
    assert "SAM-P101" not in page.text


def test_events_of_privacy_are_told():
    begin = {"event": "run_started", "first_round": 1, "sites": ["A", "B"]}
    failed = {"event": "site_failed", "round": 2, "status": "failed: SAM-P101"}
    left = {"event": "site_left", "round": 2}
    lost = {"event": "round_lost", "round": 1, "reason": "shares were opened before"}
    no_sum = {"event": "secure_sum_failed", "round": 1, "code": "SAM-P308", "message": "2 came"}
    stopped = {"event": "stopped_early", "round": 1, "best": [1, 0.5]}
    both = [event | {"site": site} for site in "AB" for event in (failed, left)]
    assert told(begin, no_sum, lost, *both, stopped) == [
        ("1", "the run", "no secure sum: SAM-P308, 2 came"),
        ("1", "the run", "lost: shares were opened before"),
        ("1", "the run", "ended: no privacy budget for another round"),
        ("2", "A, B", "left: privacy budget spent"),
    ]
    assert told(begin, both[1], stopped)[-1][2] == (
        "stopped early: no better Dice than 0.500 of round 1"
    )
    spent = {"event": "budget_spent", "rounds_done": 1}
    assert told(begin, spent, stopped)[-1][2] == "ended: no privacy budget for another round"


def test_budgets_of_many_sites_are_folded(tmp_path):
    summary = private(tmp_path)
    entry = summary["privacy"]["sites"]["A"]
    summary["privacy"]["sites"] = {f"H{number:02d}": entry for number in range(30)}
    page = report(tmp_path / "run", summary)
    assert f"{30 - plots.MAX_SITE_ROWS} more sites" in page.text
    assert all(f"H{number:02d} 8.11" in page.text for number in range(30))


@pytest.mark.parametrize("value", [1, "x", [], {"a": 1}, {"unit": "patient"}, {"unit": ["site"]}])
def test_stands_a_privacy_record_of_any_kind(tmp_path, value):
    page = report(tmp_path / "run", {"privacy": value})
    unknown = isinstance(value, dict) and value.get("unit") != "patient"
    assert ("an entry on privacy that this report cannot read" in page.text) == unknown
    for key in ("sites", "warnings", "statement", "scores", "secure_aggregation"):
        record = {"unit": "patient", key: value}
        report(tmp_path / "run", {"privacy": record})


# ---- how updates were combined ---------------------------------------------------------------


def combined(summary, errors=None, norms=None):
    """The summary with what rounds record of aggregation; `norms` by site, the same in all."""
    for entry in summary["rounds"][1:]:
        number = entry["round"]
        entry["aggregation_error"] = errors(number) if errors else None
        entry["aggregation_seconds"] = 0.2 * number
        for site, answer in entry["sites"].items():
            answer["update_norm"] = (norms or {}).get(site, 0.5)
    return summary


def settings(**keys):
    """The resolved configuration as a run folder holds it."""
    return parse_config(keys).model_dump(mode="json")


def rows_of(strategy="fedavg", summary=None, **keys):
    summary = {"strategy": strategy, "sites": {}, "rounds": []} | (summary or {})
    return dict(aggregation.strategy_rows(summary, settings(strategy=strategy, **keys)))


def write_settings(folder, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(settings(**keys)))


def aggregation_page(folder, summary, cases, events=(), **keys):
    """The report of a run with a real configuration and events."""
    write_run(folder, summary, cases)
    write_settings(folder, **keys)
    if events:
        lines = [json.dumps({"time": "2026-11-22T10:00:00", **event}) for event in events]
        (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return assert_sound(write_report(folder).read_text(encoding="utf-8"))


def test_a_plain_strategy_states_its_rule_and_codecs_alone():
    assert rows_of() == {
        "Rule": "fedavg: mean of the factors A and B",
        "Codec, up": "fp32",
        "Codec, down": "fp32",
    }


def test_every_strategy_has_its_rule_in_words():
    for strategy in SHARING:
        assert rows_of(strategy)["Rule"].startswith(f"{strategy}: ")
    assert "Wrong sites withstood" not in rows_of("svd")
    robust = rows_of("krum", federation={"byzantine_sites": 2})
    assert robust["Wrong sites withstood"] == "2"


@pytest.mark.parametrize(
    ("keys", "label", "value"),
    [
        ({"federation": {"weighting": "uniform"}}, "Weighting", "all sites count alike"),
        ({"federation": {"weighting": {"a": 2, "b": 1.5}}}, "Weighting", "constants: a 2, b 1.5"),
        ({"federation": {"clip_norm": "median"}}, "Clipping", "shortened to the median norm"),
        ({"federation": {"clip_norm": 2.5}}, "Clipping", "shortened to norm 2.5"),
        ({"server_optimiser": {"name": "adam", "learning_rate": 0.02}}, "Server optimiser",
         "adam, learning rate 0.02"),
        ({"training": {"proximal_mu": 0.1}}, "Drift control", "FedProx, mu 0.1"),
        ({"training": {"scaffold": True}}, "Drift control", "SCAFFOLD"),
        ({"peft": {"rank": 8, "site_ranks": {"a": 4}}}, "Ranks", "a 4; every other site 8"),
        ({"wire": {"up": {"top_k": 0.05, "numbers": "int4"}}}, "Codec, up",
         "the largest 5 %, int4, with error feedback"),
        ({"wire": {"up": {"low_rank": 2}, "error_feedback": False}}, "Codec, up",
         "rank 2, fp32, without error feedback"),
        ({"wire": {"down": {"numbers": "int8"}}}, "Codec, down", "int8"),
        ({"federation": {"sites_per_round": 3}}, "Sites asked", "3 of 0 in each round"),
        ({"personal": {"parts": ["decoder", "lora_B"]}}, "Personal parts", "decoder, lora_B"),
    ],
)  # fmt: skip
def test_states_what_differs_from_the_default(keys, label, value):
    rows = rows_of(**keys)
    assert value in rows.pop(label)
    plain = rows_of()
    plain.pop(label, None)
    assert rows == plain


def test_the_kept_round_is_named_with_a_caution_where_scores_chose_it(tmp_path):
    summary, cases = make_summary(rounds=5, cases=8)
    summary["adapter_of_round"] = 3
    page = aggregation_page(tmp_path / "best", summary, cases, selection={"keep": "best"})
    assert "The adapter of round 3 was kept" in page.text
    assert "over the same cases, so they flatter it" in page.text
    assert "Kept adapter of round 3, the best mean Dice" in page.text
    summary["adapter_of_round"] = 5
    best = settings(selection={"keep": "best"})
    assert "round 5 was kept" in aggregation.selection_sentence(summary, best)
    assert aggregation.selection_sentence(summary, settings()) == ""
    assert "Kept adapter" not in rows_of(summary=summary)
    kept = rows_of(summary=summary, selection={"keep": "best"})["Kept adapter"]
    assert kept == "of round 5, the best mean Dice"


def test_an_update_scaled_by_1000_is_ringed_and_named(tmp_path):
    summary, cases = make_summary(rounds=6, cases=8)
    combined(summary, norms={"A": 0.5, "B": 0.7, "C": 0.6, "D": 0.4})
    for number in (2, 3, 5):
        summary["rounds"][number]["sites"]["C"]["update_norm"] *= 1000
    page = aggregation_page(tmp_path / "run", summary, cases)
    sentence = "C sent updates up to 1 200 times as long as the round’s median (rounds 2–3, 5)."
    assert sentence in page.text
    assert page.text.index(sentence) < page.text.index("Learning curves")
    svg = plots.norm_curves(summary).svg
    assert "var(--note)" in svg
    assert ">C</text>" in svg


def test_updates_of_like_length_are_not_ringed(tmp_path):
    summary, cases = make_summary(rounds=4, cases=8)
    combined(summary, norms={"A": 0.5, "B": 0.5, "C": 4.9, "D": 0.05})
    page = aggregation_page(tmp_path / "run", summary, cases)
    assert "as long as the round’s median (" not in page.text
    assert "var(--note)" not in plots.norm_curves(summary).svg
    assert "Length (Euclidean norm)" in page.text


def test_of_two_sites_the_longer_update_is_out_of_line_too():
    summary, _ = make_summary(sites=("A", "B"), rounds=2)
    combined(summary, norms={"A": 1.0, "B": 1000.0})
    (found,) = aggregation.long_updates(summary)
    assert (found.site, found.rounds, found.times) == ("B", (1, 2), 1000.0)


def test_many_long_updates_are_summed_up():
    names = tuple("abcdefghijklmnopqrst")
    summary, _ = make_summary(sites=names, rounds=1)
    combined(summary, norms={name: 100.0 + index for index, name in enumerate(names[:8])})
    sentences = aggregation.long_update_sentences(summary)
    assert sentences[0].startswith("h sent updates up to 214 times")
    assert sentences[5:] == ["So did 3 more sites."]


def test_states_the_aggregation_error_and_its_worst_round(tmp_path):
    summary, cases = make_summary(rounds=4, cases=8)
    combined(summary, errors=lambda number: 0.4 / number)
    page = aggregation_page(tmp_path / "run", summary, cases)
    assert "It was 0.21 on average and at most 0.4, in round 1." in page.text
    assert "Combining took 0.5 s per round on average and 0.8 s at most." in page.text
    assert "on purpose" not in page.text
    assert "aggregation error of each round" in page.text
    for strategy, keys in (("median", {}), ("svd", {"server_optimiser": {"name": "yogi"}})):
        sentence = aggregation.error_sentence(summary | {"strategy": strategy}, settings(**keys))
        assert sentence.endswith("departs from that mean on purpose.")


def test_an_error_of_rounding_is_called_exact_and_an_unknown_one_unknown():
    summary, _ = make_summary(rounds=4, cases=8)
    assert aggregation.error_sentence(summary, {}) == ""  # an older run records none
    combined(summary, errors=lambda number: 1e-7 * number)
    assert "at most 4e-07: exact up to rounding" in aggregation.error_sentence(summary, {})
    assert plots.error_curve(summary) is None
    combined(summary)
    assert "is not known" in aggregation.error_sentence(summary, {})
    assert plots.error_curve(summary) is None


@pytest.mark.parametrize("text", [None, "", "[1, 2", "- a\n- b", "strategy: [1]", "\x00"], ids=repr)
def test_stands_a_configuration_of_any_kind(text):
    rows = aggregation.strategy_rows({"strategy": "svd"}, aggregation.read_settings(text))
    assert dict(rows)["Rule"].startswith("svd")


def test_bytes_are_of_sites_that_trained(tmp_path):
    summary, cases = make_summary(rounds=2, cases=8)
    for entry in summary["rounds"][1:]:
        for site, answer in entry["sites"].items():
            answer |= {"bytes_up": 1024 * 1024, "bytes_down": 512}
            if site in "CD":  # late, and one that only scores
                answer |= {"bytes_up": 0, "bytes_down": 0, "train_loss": None}
    page = report(tmp_path / "run", summary, cases)
    assert "a site sent 1.0 MiB and received 512 B on average" in page.text


def test_a_hundred_sites_of_which_ten_are_drawn_make_a_short_report(tmp_path):
    names = tuple(f"site_{number:03d}" for number in range(100))
    summary, cases = make_summary(sites=names, rounds=6, cases=200)
    combined(summary, norms={"site_007": 400.0})
    for entry in summary["rounds"][1:]:
        first = 10 * (entry["round"] - 1)
        entry["sites"] = {name: entry["sites"][name] for name in names[first : first + 10]}
    started = {"event": "run_started", "first_round": 1, "sites": names}
    page = aggregation_page(
        tmp_path / "run", summary, cases, [started, {"event": "roll_call", "present": names}],
        federation={"sites_per_round": 10}, data={"source": "phantoms", "sites": 100},
    )  # fmt: skip
    assert "10 of 100 in each round, drawn anew" in page.text
    assert "The 10 sites with the lowest Dice of 100." in page.text
    assert "All 100 sites" in page.text
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = html.split("lowest Dice of 100")[1].split("<details>")[0]
    assert shown.count("<tr>") == 12  # heads, ten sites, all sites
    assert "not asked" in page.text
    assert "Nothing happened: every site that was asked answered" in page.text
    assert "pairs of site and round" not in page.text
    assert "site_007 sent updates up to 800 times" in page.text
    rows = [re.findall(r">site_\d{3}</text>", p.svg) for p in plots.score_boxes(summary, cases)]
    assert [len(names) for names in rows] == [20, 0]


# ---- trouble ---------------------------------------------------------------------------------


def told(*events, summary=None):
    """The rows that events make, as ``(rounds, sites, what)``."""
    rows = trouble.troubles(summary or {}, events)
    return [(row.rounds, row.sites, row.what) for row in rows]


def test_events_of_sites_are_told_by_round_and_alike_ones_together():
    events = [
        {"event": "reply_refused", "round": 3, "site": "B", "status": "refused: a is not finite"},
        {"event": "round_started", "round": 4, "sites": ["A"], "resting": ["B"]},
        {"event": "round_started", "round": 5, "sites": ["A"], "resting": ["B"]},
        {"event": "sites_recalled", "round": 5, "sites": ["B"]},
        {"event": "site_failed", "round": 2, "site": "A", "status": "failed: SAM-F299"},
        {"event": "site_failed", "round": 2, "site": "C", "status": "failed: SAM-F299"},
        {"event": "round_retried", "round": 2, "attempt": 1, "sites": ["A", "C"], "wait_s": 5},
        {"event": "round_retried", "round": 2, "attempt": 2, "sites": ["A"], "wait_s": 10},
        {"event": "site_late", "round": 6, "site": "D", "status": "late: no answer in 9 s"},
        {"event": "late_reply", "round": 7, "site": "D", "status": "late: of another round"},
    ]
    assert told(*events) == [
        ("2", "A, C", "failed: SAM-F299"),
        ("2", "A, C", "asked again: too few usable answers"),
        ("3", "B", "refused: a is not finite"),
        ("4–5", "B", "not asked: it rests after a wrong answer"),
        ("5", "B", "asked although it rests: too few others"),
        ("6", "D", "late: no answer in 9 s"),
        ("7", "D", "late: of another round"),
    ]


def test_events_of_the_run_are_told():
    begin = {"event": "run_started", "first_round": 1, "sites": ["A", "B", "C"]}
    again = begin | {"first_round": 2}
    killed = begin | {"first_round": 4}
    refused = {"event": "roll_call", "present": ["A"], "refused": ["site B: base-sha256 x not y"]}
    paused = {"event": "run_paused", "code": "SAM-F102", "rounds_done": 1, "message": "too few"}
    everyone = {"event": "roll_call", "present": ["A", "B", "C"], "refused": []}
    stopped = {"event": "stopped_early", "round": 6, "best": [4, 0.8712]}
    damaged = {"event": "checkpoints_damaged", "files": ["round-0003"]}
    finished = {"event": "run_finished", "rounds": 6}
    events = (begin, refused, paused, again, everyone, damaged, killed, everyone, stopped, finished)
    summary = {"rounds": [{"round": 5, "rolled_back_to": 4, "dice_mean": 0.4, "sites": {}}]}
    assert told(*events, again, summary=summary) == [
        ("–", "the run", "damaged checkpoints passed over: round-0003"),
        ("1", "the run", "refused at the roll call: site B: base-sha256 x not y"),
        ("1", "C", "absent at the roll call"),
        ("2", "the run", "paused: SAM-F102, too few"),
        ("2", "the run", "resumed"),
        ("4", "the run", "resumed after an interruption"),
        ("5", "the run", "rolled back to the adapter of round 4: Dice fell to 0.400"),
        ("6", "the run", "stopped early: no better Dice than 0.871 of round 4"),
    ]


def test_a_status_and_its_event_are_one_row():
    event = {"event": "site_failed", "round": 2, "site": "A", "status": "failed: SAM-F299"}
    summary = {"rounds": [{"round": 2, "sites": {"A": {"status": "failed: SAM-F299"}}}]}
    assert told(event, summary=summary) == [("2", "A", "failed: SAM-F299")]


def test_a_run_that_went_well_says_so_in_one_line(tmp_path):
    summary, cases = make_summary(rounds=2, cases=8)
    events = [
        {"event": "run_started", "first_round": 1, "sites": list("ABCD")},
        {"event": "roll_call", "present": list("ABCD"), "refused": []},
        {"event": "round_started", "round": 1, "sites": list("ABCD"), "resting": []},
        {"event": "run_finished", "rounds": 2, "adapter_of_round": 2},
    ]
    page = aggregation_page(tmp_path / "run", summary, cases, events)
    assert "Trouble Nothing happened: every site that was asked answered" in page.text
    assert "What did not go as planned" not in page.text


def test_stands_events_of_any_kind(tmp_path):
    names = ("run_started", "roll_call", "round_started", "round_retried", "sites_recalled",
             "run_paused", "stopped_early", "checkpoints_damaged", "site_failed")  # fmt: skip
    odd = [{"event": name} for name in names]
    odd += [
        dict.fromkeys(
            (
                "round",
                "sites",
                "resting",
                "present",
                "refused",
                "best",
                "files",
                "first_round",
                "rounds_done",
                "message",
                "site",
                "status",
            ),
            value,
        )
        | {"event": name}
        for name in names
        for value in (None, 3, "x", {}, [HOSTILE, None])
    ]
    folder = write_run(tmp_path / "run", *make_summary(rounds=2, cases=4))
    lines = [json.dumps(event) for event in odd]
    text = "\n".join([*lines, "[1]", "null", "", '{"event": "cut o'])
    (folder / "events.jsonl").write_bytes(text.encode() + b"\n\xff\xfe")
    page = assert_sound(write_report(folder).read_text(encoding="utf-8").replace("None", "-"))
    assert HOSTILE.split()[0] in page.text


def test_much_trouble_is_folded(tmp_path):
    summary, cases = make_summary(rounds=2, cases=8)
    events = [
        {"event": "site_failed", "round": 1, "site": "A", "status": f"failed: SAM-F{number}"}
        for number in range(100, 130)
    ]
    page = aggregation_page(tmp_path / "run", summary, cases, events)
    assert "10 more rows" in page.text
    assert all(f"SAM-F{number}" in page.text for number in range(100, 130))


def test_a_real_run_of_sites_that_misbehave_is_told(tmp_path, fake_site, fake_federation):
    """Real rounds and real events: one update 1000 times too long, one refused, one that fails."""
    sites = ["a", "b", "c", "d", "e"]
    quiet = {"wait_s": 0.3, "retries": 1, "retry_wait_s": 0.01, "quarantine_rounds": 1}
    config = parse_config(
        {"rounds": 3, "strategy": "median", "federation": quiet,
         "data": {"source": "phantoms", "sites": 5}}
    )  # fmt: skip

    def far(adapter):
        update = {name: torch.full_like(value, 1e30) for name, value in adapter.items()}
        return update, {"num-examples": 1, "train-loss": 0.1}

    def scaled(adapter):
        update = {name: torch.full_like(value, 1000.0) for name, value in adapter.items()}
        return update, {"num-examples": 1, "train-loss": 0.1}

    faults = {"b": {2: far}, "c": {1: scaled, 3: scaled}, "d": {3: DataError("SAM-D102", "x")}}
    federation = fake_federation(config, sites)
    state = run_in_process(
        federation, [fake_site(name, config, instead=faults.get(name)) for name in sites]
    )
    summary, cases = make_summary(sites=tuple(sites), rounds=1, cases=10)
    summary |= {"rounds": state.history, "strategy": "median", "adapter_of_round": 3}
    folder = write_run(federation.run_dir, summary, cases)
    page = assert_sound(write_report(folder).read_text(encoding="utf-8"))
    assert "c sent updates up to 1 000 times as long as the round’s median (rounds 1, 3)." in (
        page.text
    )
    for row in ("2 b refused: a moves by 1e+30", "3 b not asked: it rests", "3 d failed: SAM-D102"):
        assert row in page.text
    assert "resumed" not in page.text
    assert "asked again" not in page.text  # three of five are enough


# ---- what sites keep, and what they do not label ---------------------------------------------


def test_fine_tuned_scores_stand_beside_the_federated_ones(tmp_path):
    summary, cases = make_summary(rounds=2, cases=8)
    summary["final"]["dice_per_site"] = {"A": 0.8, "B": 0.7, "C": 0.6, "D": 0.5}
    summary["final"]["dice_mean"] = 0.65
    summary["personal"] = {
        "parts": ["mask_decoder.a", "mask_decoder.b"], "fine_tune_steps": 20, "dice_mean": 0.66,
        "dice_per_site": {"A": 0.85, "B": 0.69, "C": 0.6, "D": None},
    }  # fmt: skip
    page = aggregation_page(tmp_path / "run", summary, cases, personal={"parts": ["decoder"]})
    assert "2 trained tensors (decoder) never leave the site" in page.text
    assert "after 20 further steps" in page.text
    for row in ("A 0.800 0.850 +0.050", "B 0.700 0.690 −0.010", "C 0.600 0.600 0.000", "D 0.500 –"):
        assert row in page.text
    assert "All sites 0.650 0.660 +0.010" in page.text


def test_personal_parts_without_fine_tuning_have_no_table(tmp_path):
    summary, cases = make_summary(rounds=2, cases=8)
    summary |= {"strategy": "fedsa", "personal": {"parts": ["x.lora_B"], "fine_tune_steps": 0}}
    page = aggregation_page(tmp_path / "run", summary, cases, strategy="fedsa")
    assert "1 trained tensor (lora_B) never leave" in page.text
    assert "Fine-tuned" not in page.text


def test_fine_tuned_scores_of_many_sites_are_folded(tmp_path):
    names = tuple(f"site_{number:03d}" for number in range(30))
    summary, cases = make_summary(sites=names, rounds=1, cases=60)
    summary["personal"] = {
        "parts": [], "fine_tune_steps": 5, "dice_mean": 0.9,
        "dice_per_site": dict.fromkeys(names, 0.9),
    }  # fmt: skip
    html = write_report(write_run(tmp_path / "run", summary, cases)).read_text(encoding="utf-8")
    assert_sound(html)
    keep = html[html.index("What sites keep") : html.index("Examples</h2>")]
    assert keep.index("<details>") < keep.index("site_000")


def test_what_is_not_labelled_is_said_and_is_no_dash(tmp_path):
    summary, cases = make_summary(rounds=2, cases=12)
    summary["final"]["unlabelled"] = {"B": ["posterior"], "D": ["anterior", "posterior"]}
    summary["final"]["dice_per_site"]["D"] = None
    for case in cases:
        for name in summary["final"]["unlabelled"].get(case["site"], []):
            case["scores"][name] = dict.fromkeys(("dice", "hd95_mm", "nsd"))
        if case["site"] == "D":
            case["dice_mean"] = None
    page = report(tmp_path / "run", summary, cases)
    assert "Not labelled at" in page.text
    assert re.search(r"anterior 9 [\d. ]+ D posterior 6 [\d. ]+ B, D", page.text)
    assert re.search(r"D 43 43 3 not labelled not labelled not labelled 2 / 2", page.text)
    boxes = plots.score_boxes(summary, cases)
    assert [plot.svg.count("not labelled<") for plot in boxes] == [1, 2]


def test_a_class_that_nobody_labels_has_no_score(tmp_path):
    summary, cases = make_summary(rounds=2, cases=8)
    summary["final"]["unlabelled"] = {site: ["posterior"] for site in "ABCD"}
    summary["final"]["dice_per_class"]["posterior"] = None
    for case in cases:
        case["scores"]["posterior"] = dict.fromkeys(("dice", "hd95_mm", "nsd"))
    page = report(tmp_path / "run", summary, cases)
    assert "posterior 0 not labelled not labelled not labelled A, B, C, D" in page.text


# ---- the lines of `samaritan simulate` -------------------------------------------------------


def test_the_line_of_a_round_tells_its_error_and_what_stands_out():
    summary, _ = make_summary(rounds=1)
    entry = combined(summary, lambda _: 0.0312, {"C": 500.0})["rounds"][1]
    entry["sites"]["D"] |= {"status": "late: no answer in 9 s", "update_norm": None}
    entry["rolled_back_to"] = 4
    first, *notes = round_line(entry, 3).splitlines()
    assert "aggregation error 0.031, 33.0 s" in first
    assert notes == [
        "  D: late: no answer in 9 s",
        "  C sent updates up to 1\u202f000 times as long as the round’s median (round 1).",
        "  rolled back to the adapter of round 4",
    ]
    combined(summary)
    del entry["rolled_back_to"]
    assert "aggregation" not in round_line(entry, 3)


def test_the_last_lines_tell_the_kept_round_and_the_fine_tuned_score():
    summary, _ = make_summary(rounds=3)
    summary |= {"adapter_of_round": 2, "personal": {"dice_mean": 0.9, "oracle_prompts": "none"}}
    summary["final"]["oracle_prompts"] = "none"
    summary["baselines"] = None
    assert _result_line(summary, "best").splitlines()[1:] == [
        "  adapter of round 2, chosen by these same cases",
        "  fine-tuned at each site: Dice 0.9000",
    ]
    assert len(_result_line(summary | {"personal": None}, "last").splitlines()) == 1


# ---- files -----------------------------------------------------------------------------------


def test_without_a_summary_is_an_error(tmp_path):
    with pytest.raises(StorageError) as caught:
        write_report(tmp_path)
    assert caught.value.code == "SAM-S301"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_broken_summary_is_an_error(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(StorageError) as caught:
        write_report(tmp_path)
    assert caught.value.code == "SAM-S302"


def test_a_report_that_cannot_be_written_is_an_error(tmp_path):
    folder = write_run(tmp_path / "run", make_summary(rounds=1, cases=4)[0])
    (folder / "report.html").mkdir()
    with pytest.raises(StorageError) as caught:
        write_report(folder)
    assert caught.value.code == "SAM-S101"
    assert not list(folder.glob(".*"))


def test_broken_side_files_are_named_in_the_report(tmp_path):
    folder = write_run(tmp_path / "run", make_summary(rounds=1, cases=4)[0])
    (folder / "cases.json").write_text("{")
    (folder / "overlays.json").write_text('{"a": 1}')
    (folder / "config.yaml").write_bytes(b"\xff\xfe\xfa")
    page = assert_sound(write_report(folder).read_text(encoding="utf-8"))
    for name in ("cases.json", "overlays.json", "config.yaml"):
        assert f"{name} could not be read" in page.text or f"{name} is not a list" in page.text


def test_an_overlay_outside_the_folder_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", make_summary(rounds=1, cases=4)[0])
    secret = tmp_path / "secret.png"
    draw_overlay(secret, *make_volumes(), (1, 1, 1), {"a": 1}, "x")
    (folder / "link.png").symlink_to(secret)
    (folder / "not.png").write_text("<svg onload=alert(1)>")
    files = ["../secret.png", str(secret), "link.png", "not.png", "missing.png", ".", "\x00"]
    (folder / "overlays.json").write_text(json.dumps([{"file": file} for file in files]))
    page = assert_sound(write_report(folder).read_text(encoding="utf-8"))
    assert not any(tag == "img" for tag, _ in page.elements)
    assert page.text.count("it is left out") == len(files)


def test_pictures_are_found_without_their_list(tmp_path):
    folder = write_run(tmp_path / "run", *make_summary(rounds=1, cases=4), overlays=True)
    (folder / "overlays.json").unlink()
    page = assert_sound(write_report(folder).read_text(encoding="utf-8"))
    assert (
        page.text.index("Worst case.")
        < page.text.index("Median case.")
        < page.text.index("Best case.")
    )


# ---- overlays --------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["both", "label", "prediction", "neither"])
def test_overlay_stands_empty_masks(tmp_path, fill):
    image, label, prediction = make_volumes()
    label = label if fill in {"both", "label"} else np.zeros_like(label)
    prediction = prediction if fill in {"both", "prediction"} else np.zeros_like(label)
    path = draw_overlay(
        tmp_path / "a/b.png", image, label, prediction, (0.5, 1.0, 3.0), {"a": 1, "b": 2}, "t"
    )
    assert matplotlib.image.imread(path).shape[2] in {3, 4}


def test_overlay_stands_odd_input(tmp_path):
    image, label, prediction = make_volumes()
    image[:5] = np.nan
    classes = {"background": 0, HOSTILE: 1, "_b": 2} | {
        f"class {index}" * 3: index for index in range(3, 41)
    }
    label[20:, 20, 10:30] = np.arange(20) + 3
    draw_overlay(tmp_path / "a.png", image, label, prediction, (0.5, 1.0, 3.0), classes, HOSTILE)
    draw_overlay(
        tmp_path / "b.png", np.zeros((1, 1, 1)), *np.zeros((2, 1, 1, 1), int), (1, 1, 1), {}, ""
    )


def test_overlay_refuses_different_grids(tmp_path):
    image, label, prediction = make_volumes()
    with pytest.raises(StorageError, match="one \\(X, Y, Z\\) grid"):
        draw_overlay(tmp_path / "a.png", image, label[1:], prediction, (1, 1, 1), {"a": 1}, "t")


def test_overlay_puts_right_left_and_front_where_the_letters_say(tmp_path, monkeypatch):
    """A bright voxel at the patient's right, front and top appears at the left, top and front."""
    from samaritan.report import overlay

    captured = {}
    monkeypatch.setattr(
        overlay, "_letters", lambda axes, plane: captured.update({plane.name: axes})
    )
    shape = (9, 9, 9)
    image = np.zeros(shape)
    for axis in range(3):
        marker = [4, 4, 4]
        marker[axis] = 8
        image[tuple(marker)] = axis + 1.0
    label = np.zeros(shape, int)
    label[2:7, 2:7, 2:7] = 1
    draw_overlay(tmp_path / "a.png", image, label, label, (1.0, 2.0, 3.0), {"a": 1}, "t")

    def place(plane, value):
        """Where the voxel of this value is drawn: fractions from the left and from the bottom."""
        axes = captured[plane]
        picture = axes.images[0]
        row, column = np.argwhere(picture.get_array() == value)[0]
        left, right, low, high = picture.get_extent()
        rows, columns = picture.get_array().shape
        point = (
            left + (column + 0.5) * (right - left) / columns,
            low + (row + 0.5) * (high - low) / rows,
        )
        return axes.transAxes.inverted().transform(axes.transData.transform(point))

    assert place("Axial", 1.0)[0] < 0.2  # right of the patient: left of the picture
    assert place("Axial", 2.0)[1] > 0.8  # front: top
    assert place("Coronal", 1.0)[0] < 0.2
    assert place("Coronal", 3.0)[1] > 0.8  # head: top
    assert place("Sagittal", 2.0)[0] < 0.2  # front: left
    assert place("Sagittal", 3.0)[1] > 0.8


# ---- small parts -----------------------------------------------------------------------------


def test_units():
    assert units.size(None) == "–"
    assert [units.size(value) for value in (0, 1023, 1024, 422_912, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "413 KiB",
        "5.0 GiB",
    ]
    assert [units.duration(value) for value in (0.21, 42.4, 192, 18_120)] == [
        "0.2 s",
        "42 s",
        "3 min 12 s",
        "5 h 02 min",
    ]
    assert [units.signed(value) for value in (0.0411, -0.008, 0.0001, -0.0001)] == [
        "+0.041",
        "−0.008",
        "0.000",
        "0.000",
    ]
    assert units.ranges([9, 3, 4, 5, 12]) == "3–5, 9, 12"
    assert units.number_word(4) == "Four"
    assert units.number_word(13) == "13"
    assert units.shorten("abcdefghij", 7) == "abcd…ij"
    assert units.percent(104_448, 93_735_472) == "0.11 %"


def test_no_style_depends_on_colour_alone():
    styles = plots.site_styles(make_summary(sites=tuple("ABCDEF"))[0])
    assert len({style.marker for style in styles.values()}) == len(styles)


# ---- a real browser --------------------------------------------------------------------------


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium binary on PATH (apt-get install chromium)"
)
def test_opens_offline_in_chromium(usual_run, tmp_path):
    path = write_report(usual_run)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom",
         path.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    page = assert_sound(done.stdout)
    summary = json.loads((usual_run / "summary.json").read_text())
    assert f"{summary['final']['dice_mean']:.3f}" in page.text
    assert f"{summary['final']['hd95_mm_mean']:.2f} mm" in page.text
    assert "104 448" in page.text
    assert "CONSOLE" not in done.stderr, done.stderr


def main(folder: Path) -> None:
    """Write the runs that the tests use, to look at: ``python -m tests.test_report FOLDER``."""
    write_report(write_run(folder / "hippocampus-4x12", *make_summary(), overlays=True))
    sites = tuple(f"Hospital {index:02d}" for index in range(64))
    write_report(write_run(folder / "sixty-four", *make_summary(sites=sites, cases=256)))
    classes = tuple(f"structure {index}" for index in range(41))
    write_report(write_run(folder / "classes", *make_summary(classes=classes, cases=120)))
    summary, cases = make_summary(
        sites=(
            HOSTILE,
            "Universitätsklinikum Schleswig-Holstein, Campus Lübeck, Radiologie",
            "医院",
        ),
        rounds=3,
        cases=14,
    )
    for entry in summary["rounds"][2:]:
        entry["sites"]["医院"] = {"status": "failed: SAM-D104"}
    summary["base"]["name"] = "tiny"
    write_report(write_run(folder / HOSTILE[:8], summary | {"baselines": None}, cases))
    summary, cases = make_summary(sites=("Solo",), rounds=1, cases=3)
    write_report(write_run(folder / "solo", summary, cases))
    write_report(write_run(folder / "empty", {}))


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
