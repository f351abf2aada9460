"""Two sides become figures, a table and files; sides that do not fit are refused."""

import json
import sys

import numpy as np
import pytest

from flowdcn_jax.evaluation import (
    EvaluationError,
    collect,
    evaluate,
    kernel_distance,
    open_images,
    open_side,
    precision_recall,
    write_statistics,
)
from tests import tiny
from tests.evaluation import fakes
from tests.evaluation.test_metrics import exact_distance, naive_precision_recall, naive_score

SAMPLES = fakes.random_images(70, seed=1)
REFERENCE = fakes.random_images(90, seed=2, spread=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds samples.npz, reference.npz, and the latter's statistics in ADM's form and in ours."""
    path = tmp_path_factory.mktemp("sides")
    fakes.save(path / "samples.npz", SAMPLES)
    fakes.save(path / "reference.npz", REFERENCE)
    write_statistics(path / "ours.npz", collect(side(path, "reference"), fakes.FakeFeatures()))
    np.savez(path / "adm.npz", arr_0=REFERENCE[:20], **adm_statistics())
    np.savez(path / "bare.npz", **adm_statistics())
    return path


def adm_statistics():
    outputs = fakes.outputs(REFERENCE)
    return {
        f"{key}{suffix}": function(outputs[name])
        for name, suffix in (("features", ""), ("spatial", "_s"))
        for key, function in (
            ("mu", lambda rows: rows.mean(0)),
            ("sigma", lambda rows: np.cov(rows, rowvar=False)),
        )
    }


def side(folder, name, **options):
    return open_side(str(folder / f"{name}.npz"), **options)


def by_name(report):
    return {figure.name: figure for figure in report.figures}


@pytest.fixture(scope="module")
def report(folder):
    return evaluate(side(folder, "samples"), side(folder, "reference"), fakes.FakeFeatures())


def test_the_figures_of_inception_are_those_of_naive_computations(report):
    x, y = fakes.outputs(SAMPLES), fakes.outputs(REFERENCE)
    figures = by_name(report)
    shares = naive_precision_recall(x["features"], y["features"], 3)
    expected = {
        "FID": exact_distance(x["features"], y["features"]),
        "sFID": exact_distance(x["spatial"], y["spatial"]),
        "inception score": naive_score(x["logits"]),
        "precision": shares[0],
        "recall": shares[1],
        "KID": kernel_distance(x["features"], y["features"], subset_size=70).mean(),
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, rel=1e-9), name
        assert figures[name].num_samples == 70
        assert figures[name].num_references == (None if name == "inception score" else 90)
    assert "only 70 images" in figures["inception score"].note
    assert figures["FID"].note == ""  # more than its 24 features
    assert "subsets of 70" in figures["KID"].note


@pytest.mark.parametrize("reference", ["adm", "ours", "bare"])
def test_reference_files_give_the_figures_of_their_images(folder, report, reference):
    found = by_name(
        evaluate(side(folder, "samples"), side(folder, reference), fakes.FakeFeatures())
    )
    expected = by_name(report)
    for name in ("FID", "sFID"):  # ADM's means are float32
        rel = 1e-12 if reference == "ours" else 1e-5
        assert found[name].value == pytest.approx(expected[name].value, rel=rel)
        assert found[name].num_references == (90 if reference == "ours" else None)
    assert found["inception score"] == expected["inception score"]
    rows = [fakes.outputs(images)["features"] for images in (SAMPLES, REFERENCE[:20])]
    shares = {"adm": precision_recall(*rows), "bare": (None, None)}.get(
        reference, (expected["precision"].value, expected["recall"].value)
    )
    assert (found["precision"].value, found["recall"].value) == shares
    counts = {"adm": 20, "ours": 90, "bare": None}
    assert found["KID"].num_references == counts[reference]
    if reference == "bare":
        assert found["KID"].value is None and "no features of the reference" == found["KID"].note


def test_the_images_beside_the_statistics_of_samples_are_scored(folder):
    figures = by_name(evaluate(side(folder, "adm"), side(folder, "ours"), fakes.FakeFeatures()))
    score = naive_score(fakes.outputs(REFERENCE[:20])["logits"])
    assert figures["inception score"].value == pytest.approx(score)
    assert figures["inception score"].num_samples == 20
    assert figures["FID"].num_samples is None


def test_a_distance_below_zero_is_rounding_and_stays_in_the_details(tmp_path):
    unclipped = []
    for seed in range(8):
        path = fakes.save(tmp_path / f"{seed}.npz", fakes.random_images(40, seed=seed))
        features = fakes.FakeFeatures(network="efficientnet_lite0")
        distance = evaluate(open_images(path), open_images(path), features).figures[0]
        unclipped.append(distance.details["unclipped"])
        assert distance.value == max(unclipped[-1], 0) < 1e-12
    assert min(unclipped) < 0


def test_figures_are_named_after_the_network(folder, report):
    def names(**options):
        sides = side(folder, "samples"), side(folder, "reference")
        return list(by_name(evaluate(*sides, fakes.FakeFeatures(**options))))

    assert names(published=False)[:3] == [
        "FD-inception with weights abababab",
        "sFD-inception with weights abababab",
        "inception score (inception with weights abababab)",
    ]
    assert names(network="dinov2", num_features=1024) == [
        "FD-DINOv2",
        "precision (DINOv2)",
        "recall (DINOv2)",
    ]
    assert names(network="dinov2", num_features=64)[0] == "FD-dinov2"
    assert names(network="efficientnet_lite0") == [
        "FD-efficientnet_lite0",
        "KID (efficientnet_lite0)",
    ]


def test_identical_images_and_fewer_than_features_give_finite_figures(tmp_path):
    same = np.repeat(fakes.random_images(1), 9, axis=0)
    images = open_images(fakes.save(tmp_path / "same.npz", same))
    few = open_images(fakes.save(tmp_path / "few.npz", fakes.random_images(2)))
    features = fakes.FakeFeatures()
    figures = by_name(evaluate(images, images, features))
    assert figures["FID"].value == 0 and figures["precision"].value == 1
    assert figures["inception score"].value == pytest.approx(1) and abs(figures["KID"].value) < 1e-9
    for sides in ((images, few), (few, images), (few, few)):
        report = evaluate(*sides, features)
        figures = by_name(report)
        assert all(np.isfinite(figures[name].value) for name in ("FID", "sFID", "KID"))
        assert figures["precision"].value is None
        assert "fewer than 4 images of the" in figures["precision"].note
        assert "only 2 images: the covariance of 24 features is singular" in figures["FID"].note
        assert "only 2 images" in report.table() and "nan" not in report.table()


def test_the_files_hold_all_that_decides_a_figure_and_make_it_again(folder, report, tmp_path):
    report.write(tmp_path / "x.json")
    names = ["x.json", "x.reference.npz", "x.samples.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["network"]["weights_sha256"] == "ab" * 32
    assert saved["network"]["protocol"] == "adm" and saved["machine"]["versions"]["scipy"]
    assert saved["samples"]["count"] == saved["samples"]["features_kept"] == 70
    assert saved["samples"]["images"]["source"] == str(folder / "samples.npz")
    fid, _, score, *_ = saved["figures"]
    assert fid["name"] == "FID" and fid["value"] == fid["details"]["unclipped"]
    assert score["details"]["splits"] == [score["value"]]
    again = evaluate(side(tmp_path, "x.samples"), side(tmp_path, "x.reference"), None)
    assert [figure.value for figure in again.figures] == [f.value for f in report.figures]


def test_the_settings_of_samples_are_kept(tmp_path, folder):
    fakes.save(tmp_path / "samples.npz", SAMPLES)
    (tmp_path / "settings.json").write_text('{"model": {"step": 6}, "settings": {"seed": 3}}')
    samples = open_side(str(tmp_path))
    report = evaluate(samples, side(folder, "ours"), fakes.FakeFeatures())
    assert report.samples.images["settings"]["settings"] == {"seed": 3}


def test_statistics_of_another_network_are_refused_before_any_work(folder, tmp_path):
    for options, message in (
        (dict(weights_sha256="cd" * 32), "ours.npz.* weights_sha256 'abab.*expected 'cdcd"),
        (dict(protocol="torch_fidelity"), "have protocol 'adm'; expected 'torch_fidelity'"),
        (dict(network="dinov2"), "have network 'inception'; expected 'dinov2'"),
        (dict(preprocessing="bicubic"), "have preprocessing 'none'; expected 'bicubic'"),
    ):
        features = fakes.FakeFeatures(**options)
        with pytest.raises(EvaluationError, match=message):
            evaluate(side(folder, "samples"), side(folder, "ours"), features)
        assert not features.calls
    for options in (dict(published=False), dict(protocol="torch_fidelity"), dict(network="dinov2")):
        features = fakes.FakeFeatures(**options)
        with pytest.raises(EvaluationError, match="do not say of which network"):
            evaluate(side(folder, "samples"), side(folder, "adm"), features)
        assert not features.calls
    with pytest.raises(EvaluationError, match="neither side says of which network"):
        evaluate(side(folder, "bare"), side(folder, "bare"), None)
    with pytest.raises(EvaluationError, match="the samples are images; expected a network"):
        evaluate(side(folder, "samples"), side(folder, "ours"), None)


def test_grey_images_are_compared_with_grey_ones_alone(folder, tmp_path):
    grey = fakes.random_images(30, channels=1)
    images = open_side(fakes.save(tmp_path / "grey.npz", grey))
    features = fakes.FakeFeatures()
    for name in ("reference", "ours", "adm", "bare"):
        with pytest.raises(EvaluationError, match="samples are grey, the reference RGB; expected"):
            evaluate(images, side(folder, name), features)
    assert not features.calls
    report = evaluate(images, images, features)
    assert by_name(report)["FID"].value == pytest.approx(0, abs=1e-12)
    expected = fakes.outputs(np.repeat(grey, 3, axis=3))["features"]
    np.testing.assert_array_equal(report.samples.features, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sigma=None), "lacks sigma; it has mu, mu_s"),
        (dict(mu=np.zeros(5)), r"sigma is float64 \[24, 24\]; expected floats \[5, 5\]"),
        (dict(mu=np.zeros(24, int)), "mu is int64"),
        (dict(mu=np.full(24, np.nan)), "mu is not finite"),
        (dict(sigma=np.triu(np.ones((24, 24)))), "sigma is no covariance"),
        (dict(sigma=-np.eye(24)), "sigma is no covariance"),
        (dict(sigma_s=np.ones((3, 3))), "sigma_s is float64"),
        (dict(features=np.zeros((4, 23))), r"features is float64 \[4, 23\]; .* \['any', 24\]"),
        (dict(record=np.array("{")), "damaged"),
        (dict(mu=np.array([{}] * 24)), "mu is pickled"),
    ],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path, changes, message):
    arrays = adm_statistics() | changes
    np.savez(
        tmp_path / "x.npz", **{key: value for key, value in arrays.items() if value is not None}
    )
    with pytest.raises(EvaluationError, match=message) as caught:
        open_side(str(tmp_path / "x.npz"))
    assert "x.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_statistics_of_other_features_are_refused(folder, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(5), sigma=np.eye(5))
    features = fakes.FakeFeatures()
    with pytest.raises(EvaluationError, match="x.npz.* are of 5 features; expected 24"):
        evaluate(side(folder, "samples"), side(tmp_path, "x"), features)
    assert not features.calls


def test_a_different_size_and_kept_features_are_noted(folder, tmp_path):
    large = fakes.save(tmp_path / "large.npz", fakes.random_images(9, size=(16, 16)))
    report = evaluate(
        side(folder, "samples"), open_side(large), fakes.FakeFeatures(), num_features=50
    )
    assert "note: samples have 8x9 pixels, the reference 16x16" in report.table()
    assert "KID are of 50 images of the samples, evenly among all" in report.table()
    assert by_name(report)["precision"].num_samples == 50


def run(*flags):
    return tiny.run([sys.executable, "evaluate.py", *flags])


def test_the_command_prints_a_table_and_writes_files(folder, report, tmp_path):
    report.write(tmp_path / "x.json")
    sides = (f"--{name}={tmp_path}/x.{name}.npz" for name in ("samples", "reference"))
    code, output = run(*sides, f"--out={tmp_path}/again.json")
    assert code == 0, output
    assert output.splitlines() == report.table().splitlines()
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["figures"] == json.loads((tmp_path / "x.json").read_text())["figures"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--reference=x",), "--samples must have a value"),
        (("--samples=ours.npz", "--reference=cut.npz"), "cut.npz is damaged"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(folder, tmp_path, flags, message):
    (folder / "cut.npz").write_bytes((folder / "adm.npz").read_bytes()[:-50])
    flags = [flag.replace("=", f"={folder}/") if "npz" in flag else flag for flag in flags]
    code, output = run(*flags, f"--out={tmp_path}/x.json")
    assert code == 2 and output.startswith("error: ") and output.count("\n") == 1, output
    assert message in output.replace(f"{folder}/", "")
    assert not list(tmp_path.iterdir())
