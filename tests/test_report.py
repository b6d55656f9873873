"""The report of a comparison: what it says, that it is safe to open, and that odd studies draw."""

import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from research.statistics.basin import basin
from research.statistics.best_of import best_of
from research.statistics.figures.arms import MOST_ROWS, evenly
from research.statistics.figures.lines import within
from research.statistics.interval import Interval
from research.statistics.mean import takes_bootstrap
from research.statistics.noise import estimate
from research.statistics.readable import readable
from research.statistics.report import numbers
from research.statistics.report.about_differences import EFRON, contrast_notes, turned
from research.statistics.report.content import Report, Verdict
from research.statistics.report.files import latex, markdown, write_report
from research.statistics.report.page import to_html
from research.statistics.report.sections import sections
from research.statistics.report.tables import Table, to_latex, to_markdown
from research.statistics.survival import Course, race
from research.statistics.verdict import finding
from tests.reported import METRIC, arm, compared, everything, grid_of_arms, study

NASTY = '<script>alert("1")</script> & $x_1$ {50%} #~^\\ | `*_'
# Letters of the figures that lie outside of their panel or are too small to be read.
NARROW_TEXTS = """
return [...document.querySelectorAll('.panel svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.height < 9;
    }).map(text => text.textContent);
});
"""
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """The page's tags, texts and tables; fails where tags are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], set()
        self.words, self.tables = "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for n, v in attributes if n in ("href", "src", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def page_of(report):
    return Page(to_html(report, sections(report)))


def titles(report):
    return [section.slug for section in sections(report)]


@pytest.fixture(scope="module")
def full():
    return everything()


@pytest.fixture(scope="module")
def parts(full):
    return sections(full)


@pytest.fixture(scope="module")
def html(full, parts):
    return to_html(full, parts)


# ---- the page ------------------------------------------------------------------------------------


def test_everything_has_its_section_and_the_verdict_comes_first(full, parts, html):
    slugs = [section.slug for section in parts]
    assert slugs == [
        "grid", "arms", "differences", "curves", "learning-rates", "best-of-k", "targets",
        "cross-losses", "noise", "failures", "settings", "pairs", "test", "machine",
    ]  # fmt: skip
    page = Page(html)
    assert html.index(str(escape(full.verdicts[0].text))) < html.index("<section")
    assert {*slugs, "verdict", "warnings"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_page_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    assert all(link == "data:," or link.startswith("#") for link in page.links)
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "image"}
    assert set(re.findall(r"https?://[^\"<\s]*", html)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert "@import" not in html and set(re.findall(r"url\((.)", html)) <= {"#"}
    assert len(html) < 1_000_000


def test_links_of_the_page_lead_somewhere(html):
    page = Page(html)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)


def test_numbers_of_the_table_are_those_of_the_study(full, html):
    table = Page(html).tables[1]
    rows = {row[0]: row for row in table[1:]}
    for result in full.arms:
        own = rows[result.name]
        assert own[1] == str(len(result.values))
        mean = sum(result.values) / len(result.values)
        assert own[2].startswith(f"{100 * mean:.2f} ± ")
        assert result.mean.interval is not None
        low, high = result.mean.interval.low, result.mean.interval.high
        assert own[3] == f"{100 * low:.2f} to {100 * high:.2f}"
    for contrast in full.contrasts:
        told = f"{100 * contrast.difference.estimate:+.2f}".replace("-", numbers.MINUS)
        assert rows[contrast.arm][4] == told
    assert [row[0] for row in table[1:]] == ["Adam", "RMSprop", "SGD"]


def test_arms_of_different_learning_rates_have_a_column_for_them():
    def at(name, rate):
        return arm(name, 0.6, 3, settings={"optimizer.lr": rate})

    (header, *rows), *_ = page_of(compared([at("SGD", 0.1), at("Adam", 0.0003)])).tables
    assert header[:4] == ["arm", "learning rate", "n", "mean ± sd %"]
    assert {row[0]: row[1] for row in rows} == {"SGD": "0.1", "Adam": "3e-4"}

    own = at("Rprop", 0.1)
    own = replace(own, runs=tuple(replace(run, settings={}) for run in own.runs))
    rows = page_of(compared([at("SGD", "0.1"), own])).tables[0][1:]
    assert {row[0]: row[1] for row in rows} == {"SGD": "0.1", "Rprop": numbers.NONE}


def test_differences_of_pairs_are_told_by_seed():
    report = compared(study())
    table = next(t for t in page_of(report).tables if t[0][1:2] == ["seed 0"])
    runs = {each.name: each.values(METRIC) for each in study()}
    expected = [runs["Adam"][seed] - value for seed, value in runs["SGD"].items()]
    found = [float(cell.replace(numbers.MINUS, "-")) for cell in table[1][1:]]
    assert found == pytest.approx([100 * each for each in expected], abs=0.0051)


def test_names_are_told_and_never_read_as_anything_else():
    arms = [arm("SGD", 0.66, 3), replace(arm("b", 0.67, 3), name=NASTY)]
    report = compared(arms, title=NASTY, warnings=[NASTY])
    html = to_html(report, sections(report))
    page = Page(html)
    assert "script" not in page.tags
    assert page.words.count(NASTY) > 3
    assert "<script" not in markdown(report, sections(report))


def test_long_names_break_at_their_humps_and_numbers_never():
    page = to_html(report := compared(grid_of_arms(2, 2)), sections(report))
    assert ">Cross<wbr>Entropy<wbr>Loss</th>" in page
    assert "<wbr>" not in "".join(re.findall(r"<td>.*?</td>", page))


def test_figures_keep_names_that_look_like_their_own_markup():
    name = 'id="x" #0072b2 1.23456'
    report = compared([arm("SGD", 0.66, 3), replace(arm("b", 0.67, 3), name=name)])
    svg = next(file for file in panels(report) if file.name == "arms").svg
    texts = [text.text for text in ElementTree.fromstring(svg).iter() if text.text]
    assert name in texts


def test_what_has_no_data_has_no_section():
    bare = Report("Nothing", METRIC, (Verdict("Nothing was run."),), "python -m research.compare")
    assert sections(bare) == []
    assert "Nothing was run." in page_of(bare).words
    one = titles(compared([arm("SGD", 0.66, 3)]))
    assert one == ["arms", "curves", "test", "machine"]


def test_failed_runs_are_told_with_their_reason(html):
    words = Page(html).words
    assert "the loss was not finite in epoch 3, step 17" in words
    assert "1 run has no value" in words


def test_pairs_that_began_otherwise_are_told():
    arms = study()
    other = replace(arms[1].runs[0], initial_weights="other")
    unknown = replace(arms[1].runs[1], first_batches=None)
    arms[1] = replace(arms[1], runs=(other, unknown, *arms[1].runs[2:]))
    words = page_of(compared(arms)).words
    assert "Some pairs did not begin alike" in words
    assert "7 equal, 1 not equal" in words and "7 equal, 1 not recorded" in words


def test_looks_at_test_are_counted():
    assert "scored once in all" in page_of(compared(study())).words
    assert "No run of these arms was scored on test" in page_of(compared([arm("a", 0.6)])).words


def test_commands_reproduce_their_sections(full):
    report = replace(full, commands={"noise": "python -m research.compare --noise a"})
    commands = {section.slug: section.command for section in sections(report)}
    assert commands["noise"] == "python -m research.compare --noise a"
    assert commands["grid"] == commands["arms"] == full.command
    assert commands["failures"] == ""


def test_many_comparisons_are_summed_up_first():
    report = compared([arm(f"arm {n}", 0.6 + 0.01 * n, 3) for n in range(8)])
    assert report.verdicts[0].text.startswith("arm 7 has the best mean")
    assert len(report.verdicts) == 8
    html = to_html(report, sections(report))
    assert html.index("<details>") < html.index("<section")


def test_of_every_arm_with_every_other_the_table_has_the_differences_to_the_best():
    report = compared([arm(f"arm {n}", 0.6 + 0.01 * n, 3) for n in range(6)], baseline=False)
    assert len(report.contrasts) == 15
    rows = {row[0]: row for row in page_of(report).tables[0][1:]}
    values = {result.name: result.mean.value for result in report.arms}
    assert rows["arm 5"][4] == numbers.NONE
    for name, value in list(values.items())[:-1]:
        assert rows[name][4] == numbers.difference(value - values["arm 5"], METRIC)
    found = [table for table in page_of(report).tables if table[0][:2] == ["arm", "against"]]
    assert len(found[0]) == 16


def test_a_comparison_turned_around_keeps_the_interval_that_decides_about_equivalence():
    report = compared([arm(f"arm {n}", 0.6 + 0.001 * n, 5) for n in range(3)], baseline=False)
    for each in report.contrasts:
        there, back = each.difference, turned(each).difference
        assert (back.simultaneous.low, back.simultaneous.high) == pytest.approx(
            (-there.simultaneous.high, -there.simultaneous.low)
        )
        for margin in (0.001, 0.01, 0.1):
            alike = [finding(found, margin=margin) == "equivalent" for found in (there, back)]
            assert alike[0] == alike[1]


def test_wins_are_cited_from_where_they_are_counted_so():
    """Of pairs as Bouthillier et al. do, of unpaired runs as Agarwal et al."""
    first, second = arm("A", 0.6, 4), arm("B", 0.61, 8)
    paired = " ".join(contrast_notes(compared([first, second])))
    assert "same seed (Bouthillier et al., 2021)" in paired and "Agarwal" not in paired
    unpaired = compared([first, replace(second, runs=second.runs[4:])])
    assert contrast_notes(unpaired)[-1].endswith("any of the other's (Agarwal et al., 2021).")


def test_the_method_is_told_as_it_is_chosen():
    assert EFRON.endswith("from 10 runs on and, at 95 %, for up to 10 comparisons")
    assert takes_bootstrap(10, 0.05 / 10)
    assert not takes_bootstrap(9, 0.05 / 10) and not takes_bootstrap(10, 0.05 / 11)


def test_a_race_is_told_in_the_metric_that_was_run(full):
    report = replace(full, metric="test/accuracy")
    words = page_of(report).words
    assert "have reached val/accuracy of 60.00 % or more, by epochs" in words
    assert "Epochs to val/accuracy of 60.00 % or more" in words


def test_a_remark_on_all_comparisons_is_said_once():
    report = compared([arm(name, 0.66, 3) for name in ("a", "b", "c")])
    students = [remark for remark in report.remarks if "Student's t" in remark]
    assert len(students) == 1 and "against" not in students[0]


# ---- the grid ------------------------------------------------------------------------------------


def test_grid_has_a_cell_for_each_arm_and_says_what_failed():
    report = compared(grid_of_arms(2, 3))
    assert report.grid is not None
    table = page_of(report).tables[0]
    assert table[0] == ["loss", "SGD", "Optimizer1", "Optimizer2"]
    assert table[2][3] == "failed"
    values = {result.name: result.mean.value for result in report.arms}
    assert table[1][1].startswith(f"{100 * values['CrossEntropyLoss SGD']:.2f} (")


def test_arms_that_share_a_cell_make_no_grid():
    arms = grid_of_arms(2, 2)
    twin = replace(arms[0], name="another learning rate")
    assert compared([*arms, twin]).grid is None
    assert compared(study()).grid is None


# ---- odd studies ---------------------------------------------------------------------------------


def panels(report):
    from research.statistics.report.files import panels_of

    return panels_of(sections(report))


def without_numbers(name):
    """An arm whose metric and curves are not finite."""
    found = arm(name, 0.6, 3)
    curves = {METRIC: ((1, math.nan), (2, math.nan)), "val/loss": ((1, 2.3), (2, math.inf))}
    runs = [replace(run, metrics={METRIC: math.nan}, curves=curves) for run in found.runs]
    return replace(found, runs=tuple(runs))


ODD = {
    "one arm": lambda: compared([arm("SGD", 0.66)]),
    "one seed": lambda: compared([arm("SGD", 0.66, 1), arm("Adam", 0.67, 1)]),
    "no run": lambda: compared([replace(arm("SGD", 0.66, 1), runs=())]),
    "one epoch": lambda: compared([one_epoch(arm("SGD", 0.66, 3))]),
    "not finite": lambda: compared([without_numbers("SGD")]),
    "all the same": lambda: compared([arm("a", 0.5, 3, spread=0), arm("b", 0.5, 3, spread=0)]),
    "long names": lambda: compared([arm(f"{'long ' * 40}{n}", 0.6, 3) for n in range(3)]),
    "other scripts": lambda: compared([arm("損失 عربي 🎉 ÿ", 0.6, 3), arm("$\\frac{", 0.6, 3)]),
    "controls": lambda: compared([arm("a\x00b\n\ud800", 0.6, 3), arm("c", 0.6, 3)]),
}


def one_epoch(found):
    runs = [replace(run, curves={METRIC: ((1, 0.5),)}) for run in found.runs]
    return replace(found, runs=tuple(runs))


@pytest.mark.parametrize("case", ODD)
def test_odd_studies_are_written_without_a_warning(case, tmp_path):
    files = write_report(ODD[case](), tmp_path)
    Page(files[0].read_text(encoding="utf-8"))
    for file in files[3:]:
        ElementTree.parse(file)


def test_odd_searches_are_written_without_a_warning(tmp_path):
    never = Course(((1, 0.1), (2, 0.12)), ended="failed")
    same = [(dict.fromkeys(("weights", "order"), seed), 0.5) for seed in range(3)]
    report = replace(
        compared([arm("a", 0.6, 2)]),
        fans={"diverged": basin([(0.1, math.nan)]), "one": basin([(0.1, 0.5)]), "none": basin([])},
        best_of={"failed": best_of([None, None]), "one": best_of([0.5])},
        races=(race({"a": [never], "b": [never, never]}, target=0.9),),
        noise=(found := estimate(same, sources=("weights",))),
        readable=readable(found.total),
    )
    page = Page(write_report(report, tmp_path)[0].read_text(encoding="utf-8"))
    assert "every run diverged" in page.words
    assert "not reached by half" in page.words


def test_a_dozen_arms_have_a_panel_each_and_the_best_comes_first():
    report = compared([arm(f"arm {n}", 0.6 + 0.01 * n, 2) for n in range(12)])
    found = [panel for panel in panels(report) if panel.name.startswith("curves-")]
    assert len({panel.name for panel in found}) == len(found) == 12
    assert found[0].words == "val/accuracy of arm 11, all others in grey"
    assert "val/accuracy, %" in found[0].svg


# ---- files ---------------------------------------------------------------------------------------


def test_files_are_the_page_its_tables_and_every_figure(tmp_path):
    report = compared(study(), title="Twice")
    files = write_report(report, tmp_path)
    assert [file.name for file in files[:3]] == ["report.html", "report.md", "report.tex"]
    assert len({file for file in files}) == len(files)
    text = files[1].read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((figures/[^)]*)\)", text))
    assert linked == {f"figures/{file.name}" for file in files[3:]}
    again = {file.name: file.read_bytes() for file in files}
    assert {file.name: file.read_bytes() for file in write_report(report, tmp_path)} == again


def test_latex_environments_are_closed_and_rows_are_as_wide_as_the_table(parts):
    text = latex(parts)
    open_ = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert open_ == []
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        widths = {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows}
        assert widths == {len(columns)}
    labels = re.findall(r"\\label\{([^}]*)\}", text)
    assert len(labels) == len(set(labels))


def test_special_characters_are_escaped_in_latex_and_markdown():
    table = Table(
        NASTY,
        ("a", "b"),
        ((NASTY, "[1] ± 2 \N{MULTIPLICATION SIGN} 3"),),
        strong=frozenset({(0, 1)}),
    )
    text = to_latex(table, "t")
    bare = re.sub(r"\\[A-Za-z]+\{\}|\\[\\{}$&%#_,]", "", text.replace(r"\\" + "\n", "\n"))
    row = next(line for line in bare.splitlines() if "script" in line and "&" in line)
    assert not set('#~^%<>|"') & set(row)
    assert r"\textbf{{[}1] $\pm$ 2 $\times$ 3}" in text
    cells = to_markdown(table).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", cells)) == 3
    assert "<script" not in cells


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (numbers.value(0.66314, METRIC), "66.31 %"),
        (numbers.value(1.0512, "val/loss"), "1.05"),
        (numbers.value(math.nan, METRIC), "not finite"),
        (numbers.difference(0.00614, METRIC), "+0.61"),
        (numbers.difference(-0.00614, METRIC), f"{numbers.MINUS}0.61"),
        (numbers.difference(-0.00001, METRIC), "0.00"),
        (numbers.difference(0.00001, METRIC), "0.00"),
        (numbers.difference(None, METRIC), numbers.NONE),
        (
            numbers.interval(Interval(-0.01, 0.02, 0.95), METRIC, sign=True),
            f"{numbers.MINUS}1.00 to +2.00",
        ),
        (numbers.probability(0.0004), "<0.001"),
        (numbers.probability(0.0312), "0.031"),
        (numbers.rate(1e-4), "1e-4"),
        (numbers.rate(0.03), "0.03"),
        (numbers.significant(12345.6), "12\N{THIN SPACE}346"),
        (numbers.significant(0), "0.00"),
        (numbers.time(12.0), "12"),
    ],
)
def test_numbers_are_written_as_people_write_them(told, expected):
    assert told == expected


# ---- what a person sees --------------------------------------------------------------------------


@pytest.mark.browser
def test_page_fits_a_phone_and_a_desk_in_light_and_dark_without_asking_the_network(html, tmp_path):
    from tests.test_browser import chromium

    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    backgrounds = {}
    with chromium(tmp_path / "profile") as driver:
        for width, scheme in [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            driver.get(file.as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert driver.execute_script("return performance.getEntriesByType('resource')") == []
            assert [entry["message"] for entry in driver.get_log("browser")] == []
            assert driver.execute_script(NARROW_TEXTS) == []
            style = "return getComputedStyle(document.body).backgroundColor"
            backgrounds[scheme] = driver.execute_script(style)
            driver.save_screenshot(str(folder / f"report-{width}-{scheme}.png"))
    assert backgrounds["light"] != backgrounds["dark"]


def test_band_of_a_share_stays_between_none_and_all():
    beyond = Interval(-0.1, 1.2, 0.95)
    assert within(beyond, (0.0, 1.0)) == Interval(0.0, 1.0, 0.95)
    assert within(beyond, (-math.inf, math.inf)) == beyond and within(None, (0.0, 1.0)) is None


@pytest.mark.parametrize("count", [0, 1, MOST_ROWS, MOST_ROWS + 1, 22, 50])
def test_rows_are_parted_evenly_and_none_is_lost(count):
    rows = [*range(count)]
    parts = [rows[part] for part in evenly(count)]
    lengths = [len(part) for part in parts]
    assert [row for part in parts for row in part] == rows
    assert len(parts) == max(math.ceil(count / MOST_ROWS), 1)
    assert max(lengths) <= MOST_ROWS and max(lengths) - min(lengths) < max(len(parts), 2)
