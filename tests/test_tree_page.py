"""The page of draft trees: text from models stays text, nothing is loaded, and it steps."""

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trees

from dynatree.errors import ResultError
from dynatree.tree_page import embedded, page_data, render_page

TEMPLATES = Path(__file__).parents[1] / "paper" / "templates"
TEMPLATE = TEMPLATES / "trees.html.j2"


def records():
    return [trees.record(), trees.record("other")]


@pytest.fixture(scope="module")
def page():
    return render_page(records(), TEMPLATE)


class Elements(html.parser.HTMLParser):
    """Start tags with attributes, and what the script and style elements hold, as a browser reads
    them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.held = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.held.append((tag, dict(attrs).get("type"), ""))

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] in ("script", "style") and self.cdata_elem:
            tag, kind, text = self.held[-1]
            self.held[-1] = (tag, kind, text + data)


def test_hostile_tokens_stay_in_the_data(page):
    elements = Elements(page)
    kinds = [(tag, kind) for tag, kind, _ in elements.held]
    assert kinds == [("style", None), ("script", "application/json"), ("script", None)]
    data = elements.held[1][2]
    assert json.loads(data) == json.loads(json.dumps(page_data(records())))
    assert json.loads(data)["vocabulary"]["1"] == trees.SCRIPT
    assert not re.search("[<>&\u2028\u2029]", data)
    assert page.count("alert(1)") == data.count("alert(1)") > 0
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.tags)


def test_embedding_is_undone_by_json_alone():
    text = "".join(map(chr, range(0x2100))) + "</script><!--]]>\U0001f600"
    assert json.loads(embedded({text: [text]})) == {text: [text]}
    assert "<" not in embedded(text)


def test_nothing_is_loaded_and_only_this_script_runs(page):
    elements = Elements(page)
    for _, attributes in elements.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "action", "style", "onclick"}
    own = page.replace(elements.held[1][2], "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", own.replace("// ", ""))
    policy = next(each["content"] for _, each in elements.tags if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; ")
    for kind, (_, _, text) in (("style", elements.held[0]), ("script", elements.held[2])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_script_makes_text_nodes_only():
    script = (TEMPLATES / "trees.js").read_text(encoding="utf-8")
    banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|DOMParser"
    assert not re.search(banned, script)


def test_a_missing_part_and_a_bad_template_are_named(tmp_path):
    copy = tmp_path / "trees.html.j2"
    copy.write_text("{{ nonsense }}")
    with pytest.raises(ResultError, match=r"trees\.css"):
        render_page(records(), copy)
    for kind in ("css", "js"):
        (tmp_path / f"trees.{kind}").write_text("")
    with pytest.raises(ResultError, match="UndefinedError"):
        render_page(records(), copy)


# The functions of the script, under Node.


def node(expression):
    """The value of a JavaScript expression; `data` is the page's, `round` its first round."""
    program = f"""
    const page = require({json.dumps(str(TEMPLATES / "trees.js"))});
    const data = JSON.parse(require("fs").readFileSync(0, "utf-8"));
    const round = data.configurations[0].prompts[0].rounds[0];
    const rule = data.configurations[0].rules[0];
    const options = {{ showPruned: true, probability: "step" }};
    process.stdout.write(JSON.stringify({expression}));
    """
    done = subprocess.run(
        ["node", "-e", program],
        input=embedded(page_data(records())),
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.node
def test_what_cannot_be_seen_is_shown_as_a_mark():
    shown = node("Object.values(data.vocabulary).map((text) => page.plain(page.visible(text)))")
    assert shown[0] == "\N{OPEN BOX}the"
    assert shown[1] == trees.SCRIPT
    assert shown[2] == "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    assert shown[4] == "⟨2028⟩⟨202E⟩⟨200B⟩"
    assert node("page.plain(page.visible(''))") == "\N{EMPTY SET}"
    short = node("page.plain(page.shortened(page.visible(' ab cdefgh'), 5))")
    assert short == "\N{OPEN BOX}ab\N{OPEN BOX}\N{HORIZONTAL ELLIPSIS}"


@pytest.mark.node
def test_a_round_is_told_in_numbers():
    said = node(
        "[round, data.configurations[0].prompts[0].rounds[1]].map((r) => "
        "page.summary(r, r.rule === null ? null : rule))"
    )
    assert said == [
        "4 nodes verified in one forward; pruned: 1 below the threshold of 5 %, 1 over the budget "
        "of 4 nodes, 1 beyond the children that the strategy gives their parent; 2 accepted; "
        "3 tokens committed, the last by the target itself.",
        "No draft in this round: 1 token committed, the target\u2019s own.",
    ]
    lines = node(
        "[1, 2, 4, 7, null].map((i) => "
        "page.details(round, rule, data.vocabulary, i).lines.join(' '))"
    )
    assert lines[0].startswith("Draft: 61 % after its parent, 61 % for the path. Accepted")
    assert "Refused: the target chooses" in lines[1]
    assert "Pruned: below the threshold of 5 %." in lines[2]
    assert "The target would have taken it." in lines[2]
    assert lines[3].startswith("Assumed of an n-gram: 90 %")
    assert lines[4].endswith("The draft had it too, but it was pruned.")


@pytest.mark.node
@pytest.mark.parametrize("pruned", [True, False])
def test_boxes_never_overlap_and_the_accepted_path_is_straight_when_most_probable(pruned):
    plan = node(
        f"page.layout(round, data.vocabulary, {{...options, showPruned: {str(pruned).lower()}}})"
    )
    boxes = plan["boxes"]
    # The bonus token has a box of its own.
    assert len(boxes) == (9 if pruned else 6)
    for one in boxes:
        assert one["left"] + one["width"] <= plan["width"]
        assert one["middle"] + one["height"] / 2 <= plan["height"]
        for other in boxes:
            if one["depth"] == other["depth"] and one is not other:
                apart = abs(one["middle"] - other["middle"])
                assert apart >= (one["height"] + other["height"]) / 2
    straight = {one["middle"] for one in boxes if one["fate"] in ("root", "accepted", "bonus")}
    assert len(straight) == 1
    path = node("page.layout(round, data.vocabulary, {...options, probability: 'path'})")
    assert [one["number"] for one in path["boxes"] if one["index"] == 3] == ["41 %"]


@pytest.mark.node
def test_addresses_lead_to_rounds_that_exist():
    given = ["#other/1/2", "#other/9/9", "#nobody/x/-3", "", "#%E0%A4%A/1/1"]
    found = node(f"{json.dumps(given)}.map((text) => page.fromAddress(text, data))")
    assert [(one["configuration"], one["prompt"], one["round"]) for one in found] == [
        ("other", 0, 1),
        ("other", 1, 0),
        ("hostile", 0, 0),
        ("hostile", 0, 0),
        ("hostile", 0, 0),
    ]
    assert (
        node(
            "page.fromAddress(page.toAddress({configuration: 'other', prompt: 0, round: 1}), data)"
        )
        == found[0]
    )


# The page itself, in a browser.


@pytest.fixture
def opened(page, tmp_path):
    """The page from a file, and everything that it complained about or asked for."""
    if os.environ.get("DYNATREE_REQUIRE_TOOLS") != "1":
        pytest.importorskip("playwright.sync_api", reason="pip install 'dynatree[test]'")
    from playwright import sync_api

    path = tmp_path / "trees.html"
    path.write_text(page, encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        complaints, requests = [], []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        yield tab
        browser.close()
    assert complaints == []
    assert requests == [path.as_uri()]


@pytest.mark.browser
def test_it_steps_by_buttons_and_keys(opened):
    where = opened.locator("#where")
    assert where.inner_text() == "Round 1 of 2"
    assert opened.locator("#back").is_disabled()
    opened.click("#forward")
    assert where.inner_text() == "Round 2 of 2"
    assert opened.locator("#forward").is_disabled()
    assert "No draft in this round" in opened.inner_text("#summary")
    for key, round_ in (
        ("ArrowLeft", 1),
        ("ArrowRight", 2),
        ("ArrowRight", 2),
        ("Home", 1),
        ("End", 2),
    ):
        opened.keyboard.press(key)
        assert where.inner_text() == f"Round {round_} of 2"
    assert opened.url.endswith("#hostile/1/2")
    opened.locator("#strip button").first.click()
    assert where.inner_text() == "Round 1 of 2"
    # A prompt that the prefill ended.
    opened.select_option("#prompt", "1")
    assert where.inner_text() == "no rounds"
    opened.keyboard.press("ArrowRight")
    opened.select_option("#configuration", label="other")
    assert opened.inner_text("#strategy").startswith("other: depth 3, branch 2")


@pytest.mark.browser
def test_tokens_are_text_and_nodes_say_what_became_of_them(opened):
    # What the data brought is shown, and none of it became an element.
    assert trees.SCRIPT in opened.inner_text("#text")
    assert opened.locator("img").count() == 0
    assert opened.locator("script").count() == 2
    for fate, count in {"root": 1, "accepted": 2, "bonus": 1, "refused": 2, "pruned": 3}.items():
        assert opened.locator(f"svg g.{fate}").count() == count
    opened.hover("svg g.pruned.wanted")
    assert "The target would have taken it." in opened.inner_text("#tip")
    opened.keyboard.press("Escape")
    assert opened.locator("#tip").is_hidden()
    opened.locator("#forward").focus()
    for _ in range(2):
        opened.keyboard.press("ArrowDown")
    assert "Accepted: the target chooses it here." in opened.inner_text("#tip")
    assert opened.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "</script>"
    )
    opened.uncheck("#pruned")
    assert opened.locator("svg g.pruned").count() == 0
    assert opened.locator("svg g.node").count() == 6


@pytest.mark.browser
def test_the_text_grows_with_the_rounds(opened):
    opened.keyboard.press("End")
    assert opened.locator("#text .token").count() == 1
    text = opened.evaluate("document.getElementById('text').textContent")
    assert text.startswith(trees.PROMPT + " the" + trees.SCRIPT + "\n" + trees.VOCABULARY[3])
