"""Plots hold what they claim, stay small and can be drawn; tables say the same everywhere."""

import json
from io import StringIO

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from fraudlab.evaluation import plots
from fraudlab.evaluation.intervals import compare, evaluate
from fraudlab.evaluation.metrics import ap, simulate_scores
from fraudlab.evaluation.tables import LABELS, table

PLOTS = [plots.precision_recall, plots.calibration, plots.score_histogram]


@pytest.fixture(scope="module")
def scores() -> dict[str, pl.DataFrame]:
    return {"decoder": simulate_scores(60_000, 5_000, skill=3.2), "boosted": simulate_scores(60_000, 5_000)}


def data_of(chart) -> list[dict]:
    """The largest data set that the chart carries."""
    return max(chart.to_dict()["datasets"].values(), key=len)


@pytest.mark.parametrize("plot", PLOTS)
def test_charts_are_small_and_can_be_drawn(plot, scores, tmp_path):
    chart = plot(scores)
    assert len(data_of(chart)) <= 300 * len(scores)
    text = chart.to_json()
    assert len(text) < 60_000
    assert "p000" not in text, "no payment may be in a plot"
    chart.save(tmp_path / "chart.png", scale_factor=1)
    picture = (tmp_path / "chart.png").read_bytes()
    width, height = int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])
    assert picture[:4] == b"\x89PNG"
    assert 500 < width < 700
    assert 350 < height < 700


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_a_model_that_says_nothing_can_be_drawn(plot, score, tmp_path):
    plot({"constant": simulate_scores(2000).with_columns(score=pl.lit(score))}).save(tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("plot", PLOTS)
def test_a_notebook_shows_pictures_and_fetches_nothing(plot, scores):
    bundle = plot(scores)._repr_mimebundle_()
    shown = bundle[0] if isinstance(bundle, tuple) else bundle
    assert set(shown) == {"image/png"}


def test_area_under_the_drawn_curve_is_average_precision():
    weak = simulate_scores(skill=2.0)
    drawn = pl.DataFrame(data_of(plots.precision_recall({"weak": weak}))).sort("recall")
    area = (drawn["recall"].diff().fill_null(drawn["recall"][0]) * drawn["precision"]).sum()
    assert area == pytest.approx(ap(weak), abs=0.005)


def test_calibrated_scores_lie_on_the_diagonal(scores):
    def inside(frame):
        points = pl.DataFrame(data_of(plots.calibration({"model": frame})))
        return points.select((pl.col("score").is_between("low", "high")).mean()).item()

    assert inside(scores["decoder"]) >= 0.8
    assert inside(scores["decoder"].with_columns(pl.col("score") / 3)) <= 0.2
    with pytest.raises(ValueError, match=r"scores go from .* to 2: must be probabilities"):
        plots.calibration({"wild": scores["decoder"].with_columns(pl.col("score") * 2)})


def test_histogram_counts_every_payment(scores):
    counts = pl.DataFrame(data_of(plots.score_histogram(scores)))
    for model, frame in scores.items():
        mine = counts.filter(model=model)
        assert mine["payments"].sum() == len(frame)
        assert mine.filter(kind="fraud")["payments"].sum() == frame["is_fraud"].sum()
        top = frame.filter(pl.col("score") >= 0.975)
        assert mine.filter(pl.col("low") == 0.975)["payments"].sum() == len(top)


def test_models_keep_their_order_and_colour(scores):
    for plot in PLOTS[:2]:
        chart = json.dumps(plot(dict(reversed(scores.items()))).to_dict())
        assert '"domain": ["boosted", "decoder"]' in chart
        assert f'"range": {json.dumps(plots.COLOURS)}' in chart


def test_tables_say_the_same_everywhere(scores):
    results = {model: evaluate(frame, draws=20) for model, frame in scores.items()}
    shown = table(results, LABELS)
    console = Console(file=StringIO(), width=250)
    console.print(shown)
    html, text, terminal = shown._repr_html_(), str(shown), console.file.getvalue()
    for result in results.values():
        for name, label in LABELS.items():
            cell = "{:.3f} ({:.3f}–{:.3f})".format(*(result[f"{name}{end}"] for end in ("", ".low", ".high")))
            for form in (html, text, terminal):
                assert cell in form
                assert label in form
    assert "payers resampled" in html
    assert "\x1b" not in text
    assert shown._repr_html_() == html, "the same table must not change from run to run"


def test_table_of_differences_and_gaps(scores):
    text = str(table({"boosted and history": compare(scores["boosted"], scores["decoder"], draws=20)}, ["ap"], signed=True))
    assert "\N{MINUS SIGN}0." in text
    assert "+" not in text
    no_payers = {model: evaluate(frame.with_columns(payer_id=pl.lit(None, pl.String)), draws=5) for model, frame in scores.items()}
    text = str(table(no_payers))
    assert sum(line.rstrip().endswith(" –") for line in text.splitlines()) == 2
    assert "payments resampled" in text
    with pytest.raises(ValueError, match="'aps' is no metric"):
        table(no_payers, ["aps"])
    assert np.isfinite(list(no_payers["decoder"].values())).all()


@pytest.mark.parametrize("plot", PLOTS)
def test_many_models_fit_in_one_chart(plot, scores):
    assert len(data_of(plot({f"model {i}": scores["boosted"] for i in range(30)}))) <= 5000


def test_thresholds_are_counted_from_the_payments(scores):
    chart = plots.thresholds(scores["decoder"], {"challenge": 0.03, "decline": 0.4})
    points = pl.DataFrame(max(chart.to_dict()["datasets"].values(), key=lambda rows: "share" in rows[0]))
    for row in points.gather_every(20).iter_rows(named=True):
        above = scores["decoder"].filter(pl.col("score") >= 1 / (1 + np.exp(-row["threshold"])))
        assert row["share"] == pytest.approx(len(above) / len(scores["decoder"]), abs=1e-4)
        assert row["precision"] == pytest.approx(above["is_fraud"].mean(), abs=0.01)
        assert row["recall"] == pytest.approx(above["is_fraud"].sum() / scores["decoder"]["is_fraud"].sum(), abs=0.01)
    assert "p000" not in chart.to_json(), "no payment may be in a plot"
