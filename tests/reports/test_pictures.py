"""Pictures: the numbers drawn, the same bytes every time, no state of matplotlib's touched, labels inert."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest

from gnomon.reports import _drawing, layer_pictures, pictures
from gnomon.reports.reading import Layer, Run, Stage, read_run

from .helpers import svg_of
from .sample import HOSTILE, hostile_run_json, run_json, write_run

TITLES = [
    "Loss, stage “train”",
    "Size against perplexity",
    "Variance over depth, stage “train”",
    "Sparsity per layer, stage “compress”",
    "Error per layer, dsnot",
    "Error per layer, eora",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def drawn(run: Run) -> list[pictures.Picture]:
    return pictures.pictures_of(run)


def labels(picture: pictures.Picture) -> list[str]:
    root = ElementTree.fromstring(svg_of(picture.uri))
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def stage_of(run: Run, layers: list[Layer]) -> Stage:
    return replace(run.arms[0].stages[1], layers=tuple(layers))


def test_a_full_run_has_every_picture(drawn: list[pictures.Picture]) -> None:
    assert [picture.title for picture in drawn] == TITLES
    for picture in drawn:
        assert picture.alt
        assert picture.caption
        assert picture.width > 300
        assert picture.height > 150
        ElementTree.fromstring(svg_of(picture.uri))


def test_the_same_bytes_every_time_and_no_date(run: Run, drawn: list[pictures.Picture]) -> None:
    assert [picture.uri for picture in pictures.pictures_of(run)] == [picture.uri for picture in drawn]
    for picture in drawn:
        assert "date" not in svg_of(picture.uri)
        assert "<metadata" not in svg_of(picture.uri)


def test_matplotlib_is_left_as_it_was(run: Run) -> None:
    before = dict(matplotlib.rcParams)
    pictures.pictures_of(run)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    write_run(tmp_path, run_json((0,)))
    code = (
        "import sys; from gnomon.reports import write_report; write_report(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_an_arm_has_one_colour_in_every_picture(run: Run, drawn: list[pictures.Picture]) -> None:
    styles = pictures.arm_styles(run)
    assert len({(style.color, style.dash) for style in styles.values()}) == len(styles) == 5
    assert styles["all"].color == _drawing.PALETTE[0]
    shown = [set(re.findall(r"--c\d+", svg_of(p.uri).partition("</style>")[2])) for p in drawn[:3]]
    wanted = {f"--c{list(_drawing._DARK).index(style.color)}" for style in styles.values()}
    assert all(wanted <= found for found in shown)


def test_more_arms_than_colours_differ_in_their_dashes(run: Run) -> None:
    many = replace(run, arms=tuple(replace(run.arms[0], name=f"arm {i}") for i in range(20)))
    styles = pictures.arm_styles(many).values()
    assert len({(style.color, str(style.dash)) for style in styles}) == 20


def test_the_colours_follow_the_readers_theme(drawn: list[pictures.Picture]) -> None:
    for picture in drawn:
        svg = svg_of(picture.uri)
        head, _, body = svg.partition("</style>")
        assert "@media (prefers-color-scheme:dark)" in head
        for light, dark in _drawing._DARK.items():
            assert light in head
            assert dark in head
            assert light not in body


def test_the_loss_is_told_in_words(run: Run, drawn: list[pictures.Picture]) -> None:
    stage = run.arms[0].stages[0]
    assert "all from " in drawn[0].alt
    assert "without dsnot from" in drawn[0].alt
    last = sum(arm.stages[0].loss[-1][1] for arm in run.arms[:3]) / 3
    told = float(re.search(r"all from [\d.]+ to ([\d.]+);", drawn[0].alt).group(1))  # type: ignore[union-attr]
    assert told == pytest.approx(last, abs=0.1)  # the mean of the last bin, over the seeds
    assert stage.eval_loss
    assert "Points" in drawn[0].caption
    assert "Means over the seeds" in drawn[0].caption


def test_averages_over_seeds_take_the_common_steps() -> None:
    curves = [[(1.0, 2.0), (2.0, 4.0), (3.0, 9.0)], [(2.0, 6.0), (1.0, 0.0)]]
    assert pictures._mean_curve(curves) == [(1.0, 1.0), (2.0, 5.0)]
    assert pictures._mean_curve(curves[:1]) == curves[0]


def test_a_long_curve_is_averaged_in_bins() -> None:
    points = [(float(i), 1.0 + i) for i in range(1001)]
    short = _drawing.thinned(points, limit=10)
    assert len(short) == 10
    assert short[0] == (50.0, 51.0)
    assert _drawing.thinned(points[:7]) == points[:7]
    assert _drawing.thinned([]) == []


def test_the_steep_start_of_a_loss_is_cut_only_where_it_hides_the_rest() -> None:
    steep = [(float(i), 100.0 if i < 3 else 2.0 + 1 / (i + 1)) for i in range(200)]
    flat = [(float(i), 3.0 - i / 200) for i in range(200)]
    roof = pictures._roof([steep])
    assert roof is not None
    assert 2.0 < roof < 2.2
    assert pictures._roof([flat]) is None
    assert pictures._roof([[(0.0, 5.0)] * 40]) is None
    assert pictures._roof([steep[:5]]) is None


def test_losses_that_are_not_finite_are_left_out(run: Run) -> None:
    stage = replace(run.arms[0].stages[0], loss=((0.0, 3.0), (1.0, math.nan), (2.0, math.inf), (3.0, 1e250)))
    one = replace(run, arms=(replace(run.arms[0], stages=(stage,)),))
    picture = pictures.loss_picture(one, 0)
    assert picture is not None
    assert "all from 3.000 to 3.000" in picture.alt
    gone = replace(stage, loss=((0.0, math.nan),), eval_loss=())
    assert pictures.loss_picture(replace(run, arms=(replace(run.arms[0], stages=(gone,)),)), 0) is None


def test_the_map_of_layers_shows_every_value(run: Run, drawn: list[pictures.Picture]) -> None:
    written = labels(drawn[3])
    values = [layer.facts["sparsity"] for layer in run.arms[0].stages[1].layers if "sparsity" in layer.facts]
    for value in values:
        assert f"{100 * value:.0f} %" in written
    assert {"q_proj", "down_proj", "block", "0", "5"} <= set(written)
    assert drawn[3].alt == "Sparsity per layer, stage “compress”, 42 layers, from 41 % to 59 %."


def test_layers_without_blocks_get_bars(run: Run) -> None:
    layers = [Layer(name, "m", {"sparsity": i / 50}) for i, name in enumerate(["encoder", *map(str, range(49))])]
    picture = layer_pictures.layer_map(stage_of(run, layers), "sparsity", "Sparsity", layer_pictures.percent)
    assert picture is not None
    assert "encoder" in labels(picture)
    assert "The first 40 of 50 layers" in picture.caption
    assert layer_pictures.layer_map(stage_of(run, []), "sparsity", "Sparsity", layer_pictures.percent) is None


def test_two_stacks_of_blocks_are_not_thrown_together(run: Run) -> None:
    names = ["encoder.layers.0.fc", "decoder.layers.0.fc"]
    assert layer_pictures._placed(names) is None
    assert layer_pictures._placed(names[:1]) == {names[0]: (0, "fc")}
    assert layer_pictures._placed(["a.0.x", "a.00.x"]) is None
    picture = layer_pictures.layer_map(
        stage_of(run, [Layer(name, "m", {"sparsity": 0.5}) for name in names]), "sparsity", "S", layer_pictures.percent
    )
    assert picture is not None
    assert {"encoder.layers.0.fc", "decoder.layers.0.fc"} <= set(labels(picture))


def test_the_latest_method_gives_the_fact(run: Run) -> None:
    layers = [Layer("a.0.x", "first", {"sparsity": 0.2}), Layer("a.0.x", "second", {"sparsity": 0.7})]
    picture = layer_pictures.layer_map(stage_of(run, layers), "sparsity", "S", layer_pictures.percent)
    assert picture is not None
    assert "70 %" in labels(picture)
    assert "20 %" not in labels(picture)


def test_errors_before_and_after(run: Run, drawn: list[pictures.Picture]) -> None:
    stage = run.arms[0].stages[1]
    assert list(layer_pictures.error_steps(stage, "dsnot")) == ["after"]
    steps = layer_pictures.error_steps(stage, "eora")
    assert list(steps) == ["before", "after"]
    before, after = (sum(values.values()) / 42 for values in steps.values())
    assert before > after
    assert f"Mean: {before:.3f} before, {after:.3f} after." in drawn[5].alt
    assert {"before", "after", "error"} <= set(labels(drawn[5]))
    assert "error after" in labels(drawn[4])
    assert layer_pictures.layer_errors(stage_of(run, [Layer("a", "m", {"rank": 1.0})]), "m") is None


def test_one_size_alone_is_no_picture(run: Run) -> None:
    one = replace(run, arms=tuple(replace(arm, stages=arm.stages[1:]) for arm in run.arms))
    assert pictures.size_picture(one) is None


def test_the_path_of_sizes(run: Run, drawn: list[pictures.Picture]) -> None:
    written = labels(drawn[1])
    assert {"train", "compress,", "evaluate", "size (MB)", "perplexity"} <= set(written)
    assert "all: train 12." in drawn[1].alt
    assert "at 12.6" in drawn[1].alt
    big = replace(run, arms=tuple(
        replace(arm, stages=tuple(replace(s, size=(s.size or 0) * 1000) for s in arm.stages)) for arm in run.arms
    ))  # fmt: skip
    picture = pictures.size_picture(big)
    assert picture is not None
    assert "size (GB)" in labels(picture)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"), ("a\nb\tc\x00d\u202ee\ud800", "a b c d e"),
        ("_hidden", "\u200a_hidden"), ("$x^2$", "$x^2$"),
        ("x" * 50, "x" * 33 + "…"), ("", ""),
    ],
)  # fmt: skip
def test_labels_from_data_are_made_fit(text: str, shown: str) -> None:
    assert _drawing.label(text) == shown


def test_hostile_labels_are_text_and_nothing_else(tmp_path: Path) -> None:
    for picture in pictures.pictures_of(read_run(write_run(tmp_path, hostile_run_json()))):
        svg = svg_of(picture.uri)
        root = ElementTree.fromstring(svg)
        names = {node.tag.rpartition("}")[2] for node in root.iter()}
        assert not names & {"script", "img", "foreignObject", "a", "iframe"}
        for node in root.iter("{http://www.w3.org/2000/svg}image"):  # the bar of colours beside a map
            assert node.attrib["{http://www.w3.org/1999/xlink}href"].startswith("data:image/png;base64,")
        assert not any(name.startswith("on") for node in root.iter() for name in node.attrib)
        assert not any("http" in value for node in root.iter() for value in node.attrib.values())
    dollars = Layer("a.0.$\\frac{1}{0}$", HOSTILE, {"error": 1.0, "sparsity": 0.5})
    run = read_run(write_run(tmp_path, run_json((0,))))
    picture = layer_pictures.layer_map(stage_of(run, [dollars]), "sparsity", HOSTILE, layer_pictures.percent)
    assert picture is not None
    assert "$\\frac{1}{0}$" in labels(picture)


def test_a_run_without_stages_has_no_pictures(tmp_path: Path) -> None:
    assert pictures.pictures_of(read_run(write_run(tmp_path, {"format": 1}))) == []
