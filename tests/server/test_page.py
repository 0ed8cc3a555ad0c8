"""The chat page in a browser, against a server whose answers are scripted."""

import base64
import io
import json
import math
import os
import re
import shutil
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from scripted import Server, chunk, refused, said
from served import serve
from starlette.responses import Response

expect.set_options(timeout=60_000)
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium: CONTRIBUTING.md says how to install it"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scripted():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(scripted):
    scripted.reset()
    yield scripted
    assert scripted.script == []


@pytest.fixture
def errors():
    """What the browser's console reports; tests that provoke it take it out."""
    found = []
    yield found
    assert found == []


@pytest.fixture
def page(browser, server, errors):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    expect(page.get_by_label("Model")).to_have_value("llama-a")
    yield page
    context.close()


def send(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def turns(page):
    return page.locator("#turns .body")


def take_out(errors, text):
    assert errors and all(text in error for error in errors), errors
    errors.clear()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def test_a_conversation(page, server):
    gate = threading.Event()
    start, *rest = said("Hel", "lo **you**")
    server.script = [[start, gate, *rest], said("Rome")]
    send(page, "Hi <b>there</b>")
    expect(turns(page).last).to_have_text("Hel")  # tokens of one packet have no speed
    gate.set()
    expect(turns(page)).to_have_text(["Hi <b>there</b>", "Hello you"])
    expect(page.locator("#turns strong")).to_have_text("you")
    expect(page.locator("footer span")).to_contain_text("llama-a · 2 tokens · ")
    page.get_by_label("Model").select_option("llama-b")
    page.get_by_label("Message").press_sequentially("Capital")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of Italy?")
    page.keyboard.press("Enter")
    expect(turns(page).last).to_have_text("Rome")
    expect(page.get_by_role("status")).to_have_text("Rome")
    assert server.bodies[0] == {
        "model": "llama-a",
        "messages": [{"role": "user", "content": "Hi <b>there</b>"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert server.bodies[1]["model"] == "llama-b"
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "Hi <b>there</b>"},
        {"role": "assistant", "content": "Hello **you**"},
        {"role": "user", "content": "Capital\nof Italy?"},
    ]


def test_a_stream_is_read_however_it_is_cut(page, server):
    """Comments, other fields, \\r\\n, and characters split between packets."""
    event = json.dumps(chunk("Grüße, 😀"), ensure_ascii=False).encode()
    sent = b": waiting\r\nevent: x\r\nid: 1\r\ndata: " + event + b"\r\n\r\n"
    server.script = [[*(bytes([byte]) for byte in sent), *said(" end")]]
    send(page, "Hi")
    expect(turns(page).last).to_have_text("Grüße, 😀 end")


MARKDOWN = """# Title

Some *emphasis*, **bold with `code`**, snake_case_name, 2 * 3 and \\*stars\\*.
A [link](https://example.org/a_(b)), https://example.org/bare. And [no link](javascript:alert(1)).

- one
- two
  1. nested
  2. again

> quoted

| name | number |
|---|--:|
| a | 1 |
| b\\|c | 2 |

```python
def f(x):  # comment
    return "text"
```

---
### Deeper
"""


def test_markdown(page, server):
    server.script = [said(*re.findall("(?s).{1,7}", MARKDOWN))]
    send(page, "Show me")
    expect(page.locator("#turns h4")).to_have_text("Deeper")
    answer = turns(page).last
    for selector, texts in {
        "h3": ["Title"],
        "em": ["emphasis"],
        "p > strong": ["bold with code"],
        "strong code": ["code"],
        "a": ["link", "https://example.org/bare"],
        "ul > li > p": ["one", "two"],
        "ul ol > li": ["nested", "again"],
        "blockquote > p": ["quoted"],
        "tr": ["namenumber", "a1", "b|c2"],
        "td.right": ["1", "2"],
        "pre .keyword": ["def", "return"],
        "pre .comment": ["# comment"],
        "pre .string": ['"text"'],
    }.items():
        expect(answer.locator(selector)).to_have_text(texts)
    expect(answer.locator("hr")).to_have_count(1)
    expect(answer).to_contain_text("snake_case_name, 2 * 3 and *stars*.")
    expect(answer).to_contain_text("[no link](javascript:alert(1))")
    links = answer.locator("a")
    expect(links.first).to_have_attribute("href", "https://example.org/a_(b)")
    expect(links.first).to_have_attribute("rel", "noopener noreferrer")
    answer.locator(".card").get_by_role("button", name="Copy").click()
    expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == 'def f(x):  # comment\n    return "text"'


def test_tables_begin_with_two_rows(page, server):
    """A line above dashes alone is text, also after a reload; text may stand above a table."""
    server.script = [said("Jane Doe | CEO\n---\nHello\na | b\n|---|---|\n| 1 | 2 |")]
    send(page, "A signature")
    for again in (False, True):
        if again:
            page.reload()
        answer = turns(page).last
        expect(answer.locator("p")).to_have_text(["Jane Doe | CEO", "Hello"])
        expect(answer.locator("tr")).to_have_text(["ab", "12"])
        expect(page.get_by_label("Model")).to_have_value("llama-a")


EVIL = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script> "
    '[a](javascript:window.hacked=1) [b](https://x/"onmouseover=hacked=1) <svg/onload=hacked>'
)


def test_what_others_say_stays_text(page, server, errors):
    """Whatever part of an answer it comes in, as a question, a name, or an error."""
    server.models = [EVIL]
    page.reload()
    expect(page.get_by_label("Model")).to_have_value(EVIL)
    page.get_by_label("probabilities").evaluate("box => box.click()")
    tokens = {"content": [{"token": EVIL, "logprob": -1, "top_logprobs": []}]}
    call = {"index": 0, "id": EVIL, "function": {"name": EVIL, "arguments": EVIL}}
    code = f"```{EVIL.replace('`', '')}\n{EVIL}\n```\n\n| {EVIL} | b |\n|---|---|\n| {EVIL} | c |"
    server.script = [
        [chunk(EVIL, logprobs=tokens), chunk(finish="stop"), "[DONE]"],
        said(f"# {EVIL}\n\n- {EVIL}\n\n{code}"),
        said(json.dumps({EVIL: EVIL})),
        [chunk(tool_calls=[call]), chunk(finish="tool_calls"), "[DONE]"],
        refused(500, EVIL),
    ]
    for number in range(1, 5):
        send(page, EVIL)
        expect(page.get_by_role("article")).to_have_count(2 * number)
        expect(button(page, "Send")).to_be_visible()
    page.locator(".tokens span").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("onerror")
    button(page, "Send results").click()
    expect(page.get_by_role("alert")).to_contain_text(EVIL)
    expect(page.get_by_role("navigation")).to_contain_text("onerror")
    assert page.locator("body").evaluate("b => b.querySelectorAll('img, script, svg').length") == 0
    assert page.evaluate("window.hacked") is None
    protocols = "links => links.map(link => link.protocol)"
    assert set(page.locator("#turns a").evaluate_all(protocols)) == {"https:"}
    take_out(errors, "status of 500")


def test_stop(page, server):
    gate = threading.Event()
    server.script = [[chunk("Once "), gate, chunk("upon a time")], said("Yes")]
    send(page, "A story")
    expect(turns(page).last).to_have_text("Once")
    button(page, "Stop").click()
    assert server.left.wait(60)
    expect(page.locator("footer span")).to_contain_text("stopped")
    send(page, "Go on?")
    expect(turns(page).last).to_have_text("Yes")
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "Once "}


def test_the_speed_is_that_of_the_answer(page, server):
    """The first chunk, which names the role alone, comes before the prompt is computed."""
    page.evaluate("() => { window.now = 0; performance.now = () => window.now; }")
    prompt, rest = threading.Event(), threading.Event()
    start, *end = said("One ", "two")
    server.script = [[chunk(role="assistant"), prompt, start, rest, *end]]
    with page.expect_response("**/v1/chat/completions"):
        send(page, "Count")
    page.evaluate("window.now = 100_000")
    prompt.set()
    expect(turns(page).last).to_have_text("One")
    page.evaluate("window.now = 100_500")
    rest.set()
    expect(page.locator("footer span")).to_have_text("llama-a · 2 tokens · 2 tokens/s")


def test_two_conversations_at_once(page, server):
    """An answer goes on while another conversation is looked at."""
    gate = threading.Event()
    server.script = [[chunk("Once "), gate, *said("upon a time")], said("Four")]
    send(page, "A story")
    expect(turns(page).last).to_have_text("Once")
    page.get_by_role("link", name="New conversation").click()
    expect(turns(page)).to_have_count(0)
    send(page, "2 + 2?")
    expect(turns(page)).to_have_text(["2 + 2?", "Four"])
    gate.set()
    page.get_by_role("link", name="A story").click()
    expect(turns(page)).to_have_text(["A story", "Once upon a time"])


def test_regenerate_and_edit(page, server):
    server.script = [said("One"), said("Two"), said("Three"), said("Four")]
    send(page, "First")
    expect(turns(page).last).to_have_text("One")
    button(page, "Regenerate").click()
    expect(turns(page)).to_have_text(["First", "Two"])
    send(page, "Second")
    expect(turns(page)).to_have_text(["First", "Two", "Second", "Three"])
    button(page, "Edit").first.click()
    page.get_by_label("Edit: later turns are removed").fill("Another")
    page.locator("article").get_by_role("button", name="Cancel").click()
    expect(turns(page)).to_have_text(["First", "Two", "Second", "Three"])
    button(page, "Edit").first.click()
    page.get_by_label("Edit: later turns are removed").fill("Another")
    page.locator("article").get_by_role("button", name="Send").click()
    expect(turns(page)).to_have_text(["Another", "Four"])
    asked = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert asked == [["First"], ["First"], ["First", "Two", "Second"], ["Another"]]


def test_an_answer_stays_until_there_is_another(page, server, errors):
    server.script = [said("One"), refused(429, "Too many requests"), said("Two")]
    send(page, "First")
    expect(turns(page).last).to_have_text("One")
    button(page, "Regenerate").click()
    expect(page.get_by_role("alert")).to_contain_text("Too many requests")
    expect(turns(page)).to_have_text(["First", "One"])
    page.reload()
    expect(turns(page)).to_have_text(["First", "One"])
    button(page, "Regenerate").click()
    expect(turns(page)).to_have_text(["First", "Two"])
    assert [len(body["messages"]) for body in server.bodies] == [1, 1, 1]
    take_out(errors, "status of 429")


def test_the_chosen_model_stays(page, server):
    """Whatever else is changed, in new conversations, and after a reload."""
    server.script = [said("One"), said("Two")]
    send(page, "First")
    expect(turns(page).last).to_have_text("One")
    page.get_by_label("Model").select_option("llama-b")
    button(page, "Settings").click()
    page.get_by_label("probabilities").check()
    expect(page.get_by_label("Model")).to_have_value("llama-b")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("llama-b")
    page.get_by_role("link", name="New conversation").click()
    expect(turns(page)).to_have_count(0)
    send(page, "Second")
    expect(turns(page).last).to_have_text("Two")
    assert [body["model"] for body in server.bodies] == ["llama-a", "llama-b"]


def test_settings(page, server):
    server.script = [said("Ahoy")]
    button(page, "Settings").click()
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for label, value in {
        "System prompt": "Be a pirate.",
        "Temperature": "0.5",
        "Max tokens": "20",
        "Top p": "0.9",
        "Top k": "40",
        "Seed": "7",
        "Stop texts": "END\n\n###",
        "Tools": json.dumps(tools),
        "Answer format": "{not JSON",
    }.items():
        page.get_by_label(label).fill(value)
    send(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("Answer format")
    page.get_by_label("Answer format").fill('{"type": "text"}')
    button(page, "Retry").click()
    expect(turns(page).last).to_have_text("Ahoy")
    assert server.bodies[0] == {
        "model": "llama-a",
        "messages": [
            {"role": "system", "content": "Be a pirate."},
            {"role": "user", "content": "Hi"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5, "max_tokens": 20, "top_p": 0.9, "top_k": 40, "seed": 7,
        "stop": ["END", "###"], "tools": tools, "response_format": {"type": "text"},
    }  # fmt: skip


def test_wrong_settings_stay_in_their_conversation(page, server):
    """There, they are named again each time that it is opened."""
    server.script = [said("One"), said("Two")]
    send(page, "First")
    expect(turns(page)).to_have_text(["First", "One"])
    page.get_by_role("link", name="New conversation").click()
    expect(turns(page)).to_have_count(0)
    button(page, "Settings").click()
    page.get_by_label("Tools").fill("[{")
    send(page, "Second")
    wrong = "Tools, JSON: This isn't JSON."
    expect(page.get_by_role("alert")).to_contain_text(wrong)
    page.get_by_role("link", name="First").click()
    send(page, "More")
    expect(turns(page)).to_have_text(["First", "One", "More", "Two"])
    page.get_by_role("link", name="Second").click()
    button(page, "Retry").click()
    expect(page.get_by_role("alert")).to_contain_text(wrong)


def token(text, probability, **others):
    others = {text: probability, **others}
    top = [{"token": t, "logprob": math.log(p)} for t, p in others.items()]
    one = {"token": text, "logprob": math.log(probability), "top_logprobs": top}
    return chunk(text, logprobs={"content": [one]})


PARIS = [token("**Paris**", 0.93), token(" is", 0.4, was=0.35), token(" nice", 0.04, big=0.5)]


def test_probabilities(page, server):
    server.script = [[*PARIS, chunk(finish="length"), "[DONE]"]]
    button(page, "Settings").click()
    page.get_by_label("probabilities").check()
    send(page, "Paris?")
    tokens = page.locator(".tokens span")
    expect(tokens).to_have_text(["**Paris**", " is", " nice"])
    expect(page.locator("footer span")).to_contain_text("cut off at max tokens")
    assert [t.get_attribute("data-shade") for t in tokens.all()] == ["0", "2", "4"]
    assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 5
    tip = page.get_by_role("tooltip")
    tokens.nth(1).hover()
    expect(tip.locator("div")).to_have_text(['" is"40.0%', '"was"35.0%'])
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(tip.locator("div")).to_have_text(['" nice"4.00%', '"big"50.0%'])
    page.get_by_label("probabilities").uncheck()
    expect(page.locator("#turns strong")).to_have_text("Paris")


def call(index, **parts):
    id_ = {"id": parts.pop("id")} if "id" in parts else {}
    return chunk(tool_calls=[{"index": index, "function": parts, **id_}])


CALLS = [
    call(0, id="call_1", name="weather", arguments=""),
    call(0, arguments='{"city": "Pa'),
    call(0, arguments='ris"}'),
    call(1, id="call_2", name="time", arguments="{}"),
    chunk(finish="tool_calls"),
    "[DONE]",
]


def test_tool_calls_and_json(page, server):
    server.script = [CALLS, said('{"weather": ', '"sunny"}')]
    send(page, "How is Paris?")
    cards = page.locator(".card")
    expect(cards).to_contain_text(["Tool call: weather", "Tool call: time"])
    expect(cards.first.locator("pre")).to_have_text('{\n  "city": "Paris"\n}')
    page.get_by_label("Result of weather").fill("sunny")
    page.get_by_label("Result of time").fill('{"hour": 9}')
    button(page, "Send results").click()
    expect(cards.last).to_contain_text("JSON")
    expect(cards.last.locator("pre")).to_have_text('{\n  "weather": "sunny"\n}')
    _, called, *results = server.bodies[1]["messages"]
    assert [(c["id"], c["type"], c["function"]) for c in called["tool_calls"]] == [
        ("call_1", "function", {"name": "weather", "arguments": '{"city": "Paris"}'}),
        ("call_2", "function", {"name": "time", "arguments": "{}"}),
    ]
    assert results == [
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": '{"hour": 9}'},
    ]


@pytest.mark.parametrize(
    "answer, message, partial",
    [
        (refused(400, "too long: 9 > 8"), "too long: 9 > 8 (status 400)", []),
        (Response("Bad gateway", 502), "Bad gateway (status 502)", []),
        ([chunk("So "), {"error": {"message": "out of memory"}}], "out of memory", ["So "]),
        ([chunk("So ")], "The connection ended before the answer did.", ["So "]),
        ([b"data: {not JSON\n\n"], "JSON", []),
    ],
)
def test_errors(page, server, errors, answer, message, partial):
    server.script = [answer, said("Well")]
    send(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(turns(page)).to_have_text(["Hi", *partial])
    button(page, "Retry").click()
    expect(turns(page)).to_have_text(["Hi", "Well"])
    expect(page.get_by_role("alert")).to_have_count(0)
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]
    if isinstance(answer, Response):
        take_out(errors, "Failed to load resource")


def test_a_server_that_is_gone(page, server, errors):
    page.context.set_offline(True)
    send(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("The server can't be reached.")
    page.context.set_offline(False)
    server.script = [said("Well")]
    button(page, "Retry").click()
    expect(turns(page)).to_have_text(["Hi", "Well"])
    take_out(errors, "Failed to load resource")


def test_a_list_of_models_that_fails(page, server, errors):
    """The server's own is asked, and the list is there afterwards."""
    page.route("**/v1/models", lambda route: route.abort(), times=1)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("The server can't be reached.")
    server.script = [said("Well")]
    send(page, "Hi")
    expect(turns(page)).to_have_text(["Hi", "Well"])
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("Model")).to_have_value("llama-a")
    assert "model" not in server.bodies[0]
    take_out(errors, "Failed to load resource")


def test_an_api_key(page, server, errors):
    """Asked for where it's needed, kept for the session only."""
    server.key = "secret"
    page.reload()
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key").fill("wrong")
    button(dialog, "Save").click()
    expect(page.get_by_role("alert")).to_contain_text("An API key is needed.")
    button(dialog, "Cancel").click()
    button(page, "Retry").click()
    dialog.get_by_label("Key").fill("secret")
    button(dialog, "Save").click()
    expect(page.get_by_label("Model")).to_have_value("llama-a")
    expect(page.get_by_role("alert")).to_have_count(0)
    server.script = [said("Open")]
    send(page, "Sesame")
    expect(turns(page).last).to_have_text("Open")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('key')") == "secret"
    take_out(errors, "status of 401")


def test_conversations_are_kept(page, server):
    server.script = [said("One"), said("Two"), said("Three")]
    send(page, "First")
    expect(turns(page).last).to_have_text("One")
    page.get_by_role("link", name="New conversation").click()
    expect(turns(page)).to_have_count(0)
    send(page, "Second")
    expect(turns(page).last).to_have_text("Two")
    links = page.get_by_role("navigation").get_by_role("listitem")
    expect(links).to_have_text(["Second", "First"])
    page.reload()
    expect(turns(page)).to_have_text(["Second", "Two"])
    page.get_by_role("link", name="First").click()
    expect(turns(page)).to_have_text(["First", "One"])
    page.get_by_label("Name of the conversation").fill("Renamed")
    page.keyboard.press("Enter")
    expect(links).to_have_text(["Second", "Renamed"])
    send(page, "More")
    expect(turns(page).last).to_have_text("Three")
    page.once("dialog", lambda dialog: dialog.accept())
    button(page, "More").click()
    button(page, "Delete conversation").click()
    expect(turns(page)).to_have_count(0)
    expect(links).to_have_text(["Second"])
    page.reload()
    expect(links).to_have_text(["Second"])


def test_an_answer_that_a_reload_interrupts(page, server):
    server.script = [[chunk("Once "), threading.Event()]]
    send(page, "A story")
    expect(turns(page).last).to_have_text("Once")
    page.reload()
    expect(turns(page)).to_have_text(["A story", "Once"])
    assert server.left.wait(60)


def test_a_full_storage(page, server):
    """Said, and the conversation goes on."""
    page.evaluate("""() => {
        for (let size = 1 << 22; size; size >>= 1)
            try { localStorage.setItem(size, "x".repeat(size)) } catch {}
    }""")
    server.script = [said("Yes")]
    send(page, "Is there room?")
    expect(turns(page).last).to_have_text("Yes")
    expect(page.get_by_role("alert")).to_contain_text("storage is full")
    page.evaluate("localStorage.clear()")
    button(page, "Retry").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.reload()
    expect(turns(page).last).to_have_text("Yes")


def test_export(page, server):
    server.script = [CALLS]
    send(page, "How is Paris?")
    expect(page.locator(".card")).to_have_count(2)
    saved = {}
    for name in ("JSON", "Markdown"):
        button(page, "More").click()
        with page.expect_download() as download:
            button(page, f"Export as {name}").click()
        saved[download.value.suggested_filename] = download.value.path().read_text()
    (_, data), (_, text) = saved.items()
    assert [name.rpartition(".")[2] for name in saved] == ["json", "md"]
    assert json.loads(data)["messages"][0] == {"role": "user", "content": "How is Paris?"}
    assert text.startswith("# How is Paris?\n\n## You\n\nHow is Paris?\n\n## Assistant\n\n```json")


def violations(page):
    found = Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(page, server, errors, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    gate = threading.Event()
    server.script = [
        said(MARKDOWN),
        CALLS,
        [*PARIS, gate, chunk(finish="stop"), "[DONE]"],
        refused(500, "Out of memory"),
    ]
    assert violations(page) == []
    send(page, "Show me")
    expect(page.locator("#turns h4")).to_have_text("Deeper")
    button(page, "Settings").click()
    page.get_by_label("probabilities").check()
    send(page, "And the weather?")
    expect(page.locator(".card")).to_have_count(3)
    button(page, "Edit").first.click()
    assert violations(page) == []
    button(page, "Cancel").last.click()
    button(page, "Send results").click()
    page.locator(".tokens span").nth(2).hover()
    assert violations(page) == []
    gate.set()
    button(page, "Regenerate").click()
    expect(page.get_by_role("alert")).to_contain_text("Out of memory")
    button(page, "More").click()
    assert violations(page) == []
    button(page, "API key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert violations(page) == []
    take_out(errors, "status of 500")


def test_a_phone(page, server):
    page.set_viewport_size({"width": 360, "height": 640})
    page.reload()
    server.script = [said(MARKDOWN + "x" * 300)]
    chats = page.get_by_role("navigation")
    expect(chats).to_be_hidden()
    send(page, "Show me")
    expect(page.locator("#turns h4")).to_have_text("Deeper")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#turns").evaluate("turns => turns.scrollWidth <= turns.clientWidth")
    button(page, "Chats").click()
    expect(chats).to_be_visible()
    page.keyboard.press("Escape")
    expect(chats).to_be_hidden()
    button(page, "Settings").click()
    expect(page.get_by_label("Temperature")).to_be_in_viewport()
    assert violations(page) == []
    button(page, "Settings").click()
    expect(page.get_by_label("Temperature")).to_be_hidden()
    button(page, "Chats").click()
    page.get_by_role("link", name="New conversation").click()
    expect(chats).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_in_viewport()


def test_with_the_real_server(browser, smollm2_path, errors):
    """A turn, with probabilities, of `llama serve` as it is started."""
    with serve(smollm2_path, "--device=cpu") as server:
        context = browser.new_context()
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(server.url)
        button(page, "Settings").click()
        page.get_by_label("Show the probabilities of tokens").check()
        page.get_by_label("Temperature").fill("0")
        send(page, "What is the capital of France?")
        expect(turns(page).last).to_have_text("The capital of France is Paris.")
        expect(page.get_by_label("Model")).to_have_value("SmolLM2-135M-Instruct.Q4_1")
        context.close()


PASTE = """(file) => {
  const data = new DataTransfer();
  data.items.add(file);
  const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
  document.getElementById("text").dispatchEvent(event);
}"""


def paste_image(page):
    """A large and transparent one."""
    page.evaluate(f"""() => {{
      const canvas = Object.assign(document.createElement("canvas"), {{width: 2000, height: 100}});
      canvas.toBlob((blob) => ({PASTE})(new File([blob], "a.png", {{type: "image/png"}})));
    }}""")


def test_images_are_pasted_shown_and_sent(page, server):
    """Large ones are made smaller; an image can be taken back before it is sent, and stays."""
    server.script = [said("A cat"), said("A dog")]
    paste_image(page)
    expect(page.locator("#attached img")).to_have_count(1)
    paste_image(page)
    expect(page.locator("#attached img")).to_have_count(2)
    page.get_by_title("Remove").first.click()
    expect(page.locator("#attached img")).to_have_count(1)
    send(page, "What is this?")
    expect(turns(page)).to_have_text(["What is this?", "A cat"])
    expect(page.locator("#turns article.user img")).to_have_js_property("naturalWidth", 1120)
    expect(page.locator("#attached img")).to_have_count(0)
    [image, text] = server.bodies[0]["messages"][0]["content"]
    scheme, _, data = image["image_url"]["url"].partition(",")
    assert scheme == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.getextrema() == ((255, 255),) * 3  # as docs/vision.md says of transparency
    assert text == {"type": "text", "text": "What is this?"}
    page.reload()
    expect(page.locator("#turns article.user img")).to_have_count(1)
    send(page, "Sure?")
    expect(turns(page).last).to_have_text("A dog")
    assert server.bodies[1]["messages"][0]["content"] == [image, text]
    assert server.bodies[1]["messages"][2]["content"] == "Sure?"


def test_images_that_a_model_refuses_are_taken_back(page, server, errors):
    server.script = [refused(400, "the model reads only text"), said("A joke")]
    page.evaluate(f"() => ({PASTE})(new File(['text'], 'a.txt'))")
    expect(page.get_by_role("alert")).to_have_text("a.txt isn't an image.")
    for number in (1, 2):
        paste_image(page)
        expect(page.locator("#attached img")).to_have_count(number)
    send(page, "What is this?")
    expect(page.get_by_role("alert")).to_contain_text("the model reads only text")
    button(page, "Edit").click()
    page.locator("article").get_by_title("Remove").first.click()
    page.locator("article").get_by_role("button", name="Cancel").click()
    expect(page.locator("article img")).to_have_count(2)
    button(page, "Edit").click()
    for _ in range(2):
        page.locator("article").get_by_title("Remove").first.click()
    page.get_by_label("Edit: later turns are removed").fill("Tell a joke")
    page.locator("article").get_by_role("button", name="Send").click()
    expect(turns(page)).to_have_text(["Tell a joke", "A joke"])
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "Tell a joke"}]
    take_out(errors, "status of 400")
