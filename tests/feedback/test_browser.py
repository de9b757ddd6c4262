"""The page in a real browser: every key, undo, reload, two raters, a killed server, a phone, what a screen reader says."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import CHROMIUM, chromium, store_of
from PIL import Image

import scoreact as sa
from scoreact.cli.main import main
from scoreact.feedback.answers import BOTH_BAD, TIE, read_answers, read_ratings
from scoreact.feedback.leases import TaskQueue
from scoreact.feedback.page import PageServer
from scoreact.feedback.store import Store, load_sample

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(store or address, rater) -> a page that shows the first task; nothing of it may fail in the console."""
    servers, contexts, errors = [], [], []

    def opened(store: Store | str, rater: str = "ann", questions: tuple[str, ...] = ("better",), **how: Any) -> Any:
        if isinstance(store, Store):
            server = PageServer(TaskQueue(store, questions, repeats=0.0))
            servers.append(server)
            server.start()
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Security" in line.text else None)
        page.add_init_script(f"localStorage.setItem('scoreact-rater', '{rater}')")
        page.goto(server.url if isinstance(store, Store) else store)
        ready(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    for server in servers:
        server.stop()
    assert errors == []


def ready(page: Any, task: int | None = None) -> str:
    """Wait until a task is on the screen, this one where it is named; "task-question"."""
    mark = "[data-ready]" if task is None else f"[data-ready^='{task}-']"
    page.wait_for_selector(f"#samples{mark}:not([data-ready=''])", state="attached")
    return str(page.get_attribute("#samples", "data-ready"))


def settled(page: Any) -> None:
    """Wait until the server has everything."""
    page.wait_for_function("() => JSON.parse(localStorage.getItem('scoreact-outbox') || '[]').length === 0")


def urls(page: Any) -> list[str]:
    """The samples on the screen, from left to right."""
    return [
        re.sub(r"^https?://[^/]*", "", url)
        for url in page.eval_on_selector_all("#samples img", "all => all.map(i => i.src)")
    ]


def test_every_key_answers_and_the_next_is_there(visit: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path, 10)
    page = visit(store)
    seen = []
    for key in ("ArrowLeft", "ArrowRight", "1", "2", "ArrowDown", "ArrowUp", "s", "S"):
        seen.append((int(ready(page).split("-")[0]), urls(page)))
        page.keyboard.press(key)
        ready(page, seen[-1][0] + 1)
    for key in ("x", "Control+1", "Alt+ArrowLeft", "Shift"):  # the browser's own, or nobody's
        page.keyboard.press(key)
    seen.append((9, urls(page)))
    page.get_by_role("button", name="Left: a cat 9").click()
    ready(page, 10)
    seen.append((10, urls(page)))
    page.get_by_role("button", name="Both bad").click()
    page.wait_for_function("() => document.getElementById('prompt').textContent.startsWith('Nothing left')")
    settled(page)
    found = read_answers(store)
    assert found.task.tolist() == [1, 2, 3, 4, 5, 6, 9, 10]
    expected = [0, 1, 0, 1, TIE, BOTH_BAD, 0, BOTH_BAD]  # what was pressed, from left to right
    for number, winner, side in zip(found.task.tolist(), found.winner.tolist(), expected, strict=True):
        own, shown = [f"/samples/{s}.png" for s in (2 * number - 1, 2 * number)], dict(seen)[number]
        assert set(shown) == set(own)
        assert winner == (side if side < 0 else own.index(shown[side]))
    assert all(0 <= spent < 60_000 for spent in found.milliseconds)
    answers = [row["answer"] for row in store.rows("SELECT * FROM answers ORDER BY id")]
    assert answers == ["left", "right", "left", "right", "tie", "both_bad", "skip", "skip", "left", "both_bad"]


def test_undo_and_reload_show_the_same_pair(visit: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path, 4)
    page = visit(store, questions=("fits", "looks"))
    first = urls(page)
    page.reload()
    assert ready(page) == "1-fits"
    assert urls(page) == first
    page.keyboard.press("1")
    page.wait_for_selector("#samples[data-ready='1-looks']")
    assert urls(page) == first
    page.reload()
    assert ready(page) == "1-looks"
    assert page.inner_text("#asks") == "Which one looks better?"
    page.keyboard.press("2")
    ready(page, 2)
    page.keyboard.press("z")
    page.wait_for_selector("#samples[data-ready='1-looks']")
    page.keyboard.press("Backspace")
    page.wait_for_selector("#samples[data-ready='1-fits']")
    assert urls(page) == first
    page.keyboard.press("z")
    page.wait_for_function("() => document.getElementById('said').textContent === 'There is nothing to undo.'")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#samples[data-ready='1-looks']")
    settled(page)
    assert read_answers(store).winner.tolist() == [TIE]
    assert len(store.rows("SELECT 1 FROM answers WHERE undone IS NOT NULL")) == 2


def test_the_next_pair_is_loaded_before_it_is_asked_for(visit: Any, tmp_path: Path) -> None:
    page = visit(store_of(tmp_path, 6))
    page.wait_for_function(
        "() => performance.getEntriesByType('resource').filter(e => e.name.includes('/samples/')).length >= 6"
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    press = """() => new Promise((done) => {
        const samples = document.getElementById("samples"), start = performance.now(), before = samples.dataset.ready;
        new MutationObserver(() => { if (!["", before].includes(samples.dataset.ready)) done(performance.now() - start); })
            .observe(samples, { attributes: true });
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "1", bubbles: true }));
    })"""
    spent = [page.evaluate(press)]
    shown = urls(page)
    assert ready(page) == "2-better"
    assert not any(url.endswith(tuple(shown)) for url in asked)
    for _ in range(3):
        settled(page)
        spent.append(page.evaluate(press))
    assert min(spent) < 100  # milliseconds; the least of four, for this machine may be busy with other things


def test_two_raters_share_the_pairs(visit: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path, 8)
    ann = visit(store)
    bob = visit(ann.url, "bob")
    assert ready(ann) != ready(bob)
    for page in (ann, bob, bob, ann):
        before = ready(page)
        page.keyboard.press("1")
        page.wait_for_function(
            "before => !['', before].includes(document.getElementById('samples').dataset.ready)", arg=before
        )
        settled(page)
    found = read_answers(store)
    assert len(set(found.task.tolist())) == 4
    assert [found.raters[i] for i in found.rater] == ["ann", "bob", "bob", "ann"]
    bob.fill("#rater", "eve")
    bob.keyboard.press("Enter")
    bob.wait_for_function("() => document.getElementById('counts').textContent.startsWith('0 answered')")


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `scoreact rate` on the folder's store, and its address."""
    store_of(tmp_path, 6).close()
    words = ["rate", "preferences.db", "--repeats", "0", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "scoreact", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().split()[-1]
    process.kill()
    process.communicate()


def test_a_server_that_is_killed_and_started_again_loses_nothing(visit: Any, serving: Any, tmp_path: Path) -> None:
    process, url = serving
    page = visit(url)
    page.keyboard.press("1")
    ready(page, 2)
    settled(page)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    page.keyboard.press("2")
    ready(page, 3)
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.getElementById('said').textContent.startsWith('The server does not answer')")
    with Store(tmp_path / "preferences.db", make=False) as again:
        server = PageServer(TaskQueue(again, ("better",)), port=int(url.split(":")[2].strip("/")))
        server.start()
        settled(page)
        ready(page, 4)
        page.keyboard.press("ArrowUp")
        ready(page, 5)
        settled(page)
        rows = again.rows("SELECT task, answer FROM answers ORDER BY id")
        server.stop()
    assert [tuple(row) for row in rows] == [(1, "left"), (2, "right"), (3, "tie"), (4, "both_bad")]


def test_four_are_ranked_with_equals(visit: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path, 2, "rank")
    page = visit(store)
    places = urls(page)
    box = page.get_by_role("button", name="Undo").bounding_box()
    assert box["y"] + box["height"] < page.viewport_size["height"]  # all is on the screen
    page.keyboard.press("3")
    page.keyboard.press("4")
    page.keyboard.press("z")  # of the one that is not finished
    page.keyboard.press("1")
    page.keyboard.press("ArrowDown")
    page.get_by_role("button", name="Sample 2").click()
    assert page.eval_on_selector_all(".rank", "all => all.map(m => m.textContent)") == ["2", "2", "1"]
    page.keyboard.press("4")
    ready(page, 2)
    settled(page)
    (row,) = store.rows("SELECT * FROM answers")
    assert json.loads(row["answer"]) == [2, 2, 1, 4]
    best = [f"/samples/{number}.png" for number in (1, 2, 3, 4)].index(places[2])
    won = read_answers(store).winner.tolist()
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    assert all(won[pairs.index(pair)] == pair.index(best) for pair in pairs if best in pair)


@pytest.mark.parametrize(("kind", "keys", "values"), [("thumbs", ["ArrowUp", "ArrowDown", "2", "1"], [1, 0, 1, 0]),
                                                      ("scores", ["5", "1", "s", "3"], [5, 1, 3])])  # fmt: skip
def test_single_samples_are_rated(visit: Any, tmp_path: Path, kind: str, keys: list[str], values: list[int]) -> None:
    store = store_of(tmp_path, 5, kind)
    page = visit(store)
    for i, key in enumerate(keys):
        page.keyboard.press(key)
        ready(page, i + 2)
    settled(page)
    assert read_ratings(store).value.tolist() == values


def test_series_are_plotted_on_one_scale(visit: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "preferences.db", synced=False)
    a, b = (store.add_sample(height * torch.ones(20), "flat") for height in (1.0, 2.0))
    store.add_task([a, b])
    store.add_task([store.add_sample(torch.tensor(point), "point") for point in ([3.0, 0.0], [0.0, 3.0])])
    page = visit(store)
    heights = page.eval_on_selector_all("polyline", "all => all.map(p => Number(p.points[0].y))")
    assert sorted(heights) == [2, 98]
    page.keyboard.press("1")
    ready(page, 2)
    places = page.eval_on_selector_all("circle", "all => all.flatMap(c => [c.cx.baseVal.value, c.cy.baseVal.value])")
    across = 50 + 48 / 1.1
    assert sorted(places) == pytest.approx(sorted([across, 50, 50, 100 - across]))


def colours(page: Any, expected: list[set[tuple[int, ...]]]) -> list[set[tuple[int, ...]]]:
    """Of each sample on the screen, the colours in the middle, until all that are expected were seen or a while is over."""
    found: list[set[tuple[int, ...]]] = [set(), set()]
    begin = time.monotonic()
    while found != expected and time.monotonic() < begin + 4:
        for seen, image in zip(found, page.locator("#samples img").all(), strict=True):
            with Image.open(io.BytesIO(image.screenshot())) as shown:
                middle = shown.convert("RGB").getpixel((shown.width // 2, shown.height // 2))
                seen.add(tuple(round(value / 51) for value in middle))
    return found


def test_films_play_side_by_side_and_again(visit: Any, tmp_path: Path) -> None:
    """Three frames of one colour each, an eighth of a second long; small and enlarged."""
    store = Store(tmp_path / "preferences.db", synced=False)
    red, green, blue = torch.eye(3)
    films = [
        torch.stack(frames, 1)[:, :, None, None].expand(3, 3, 8, 8)
        for frames in ((red, green, blue), (blue, blue, red))
    ]
    store.add_task([store.add_sample(film, "colours") for film in films])
    page = visit(store)
    of_film = {"/samples/1.png": {(5, 0, 0), (0, 5, 0), (0, 0, 5)}, "/samples/2.png": {(0, 0, 5), (5, 0, 0)}}
    expected = [of_film[url] for url in urls(page)]
    assert colours(page, expected) == expected
    page.keyboard.press("f")
    assert colours(page, expected) == expected  # they begin anew


@pytest.fixture
def rated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """rated(words of `scoreact rate`) -> the address of the page of a process of it, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    processes: list[subprocess.Popen[str]] = []

    def opened(*words: str) -> str:
        command = [sys.executable, "-m", "scoreact", "rate", *words, "--repeats", "0", "--port", "0"]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        out = processes[-1].stdout
        assert out is not None
        address = out.readline().split()[-1]
        assert any("wait for an answer" in line for line in iter(out.readline, ""))
        return address

    yield opened
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_tuned_pipeline_is_compared_with_what_it_was(visit: Any, rated: Callable[..., str], tmp_path: Path) -> None:
    """Both pictures of a prompt, as the run itself draws them with and without what it learned."""
    pytest.importorskip("diffusers")
    from tiny_pipelines import make, spelling_tokenizer

    make("sd", spelling_tokenizer()).save_pretrained("sd")
    Path("prompts.txt").write_text("a cat\ntwo dogs\n")
    small = [
        "--iterations",
        "1",
        "--batch-size",
        "4",
        "--heldout-samples",
        "4",
        "--reference-batches",
        "1",
        "--steps",
        "4",
    ]
    words = ["--prompts", "prompts.txt", "--reward", "brightness", "--algorithm", "draft", "--learning-rate", "0.05"]
    assert main(["train", "./sd", *words, *small, "--guard", "off", "--no-report", "--out", "run"]) == 0
    page = visit(rated("run", "--pairs", "4", "--seed", "3"))
    chosen = []
    for _ in range(4):
        number = int(ready(page).split("-")[0])
        assert page.locator("#prompt").inner_text() in ("a cat", "two dogs")
        sizes = page.eval_on_selector_all("#samples img", "all => all.map(i => [i.complete, i.naturalWidth])")
        assert sizes == [[True, 16], [True, 16]]
        chosen.append((number, page.locator("#prompt").inner_text(), int(re.findall(r"\d+", urls(page)[0])[0])))
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(f"() => !document.getElementById('samples').dataset.ready.startsWith('{number}-')")
    settled(page)
    run = sa.open_run("run")
    drawn = {
        (prompt, source): run.sample([prompt], 4, seed=3, reference=source == "reference")
        for prompt in ("a cat", "two dogs") for source in ("tuned", "reference")
    }  # fmt: skip
    with Store(tmp_path / "preferences.db", make=False) as store:
        answers = read_answers(store)
        both = np.stack([answers.first, answers.second])
        won = [answers.samples[i].id for i in both[answers.winner, range(4)]]
        assert list(zip(answers.task, answers.prompts, won, strict=True)) == chosen
        for sample in answers.samples:
            expected = drawn[sample.prompt, sample.source][sample.number]
            torch.testing.assert_close(load_sample(sample), expected, atol=3e-3, rtol=0)
        for i, j in both.T:
            assert (answers.samples[i].source, answers.samples[j].source) == ("tuned", "reference")
            assert not torch.equal(load_sample(answers.samples[i]), load_sample(answers.samples[j]))


@pytest.mark.slow
def test_a_video_pipelines_films_play(visit: Any, rated: Callable[..., str]) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import SIZES, make, spelling_tokenizer

    make("wan", spelling_tokenizer()).save_pretrained("wan")
    sizes = [word for name in ("height", "width", "frames") for word in ("--option", f"{name}={SIZES['wan'][name]}")]
    page = visit(rated("./wan", "--pairs", "1", "--prompts", "a cat runs", *sizes))
    assert page.locator("#prompt").inner_text() == "a cat runs"
    bytes_of = "async (url) => Array.from(new Uint8Array(await (await fetch(url)).arrayBuffer()))"
    with Store("preferences.db", make=False) as store:
        films = [load_sample(sample) for sample in store.samples()]
    assert [film.shape for film in films] == [(3, 5, 32, 32)] * 2
    assert not torch.equal(*films)
    for number, film in enumerate(films, 1):
        with Image.open(io.BytesIO(bytes(page.evaluate(bytes_of, f"/samples/{number}.png")))) as shown:
            assert (shown.n_frames, shown.info["duration"]) == (5, 125)
            for frame in range(5):
                shown.seek(frame)
                pixels = torch.from_numpy(np.array(shown.convert("RGB"))).permute(2, 0, 1)
                assert torch.equal(pixels, (255 * film[:, frame]).round().byte())


def test_a_phone_a_dark_screen_and_a_screen_reader(visit: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path, 3, prompt="a very long prompt " * 12)
    phone = visit(store, viewport={"width": 360, "height": 740}, has_touch=True, color_scheme="dark")
    assert phone.evaluate("() => document.documentElement.scrollWidth") <= 360
    for name in ("Left", "Tie", "Both bad", "Right", "Skip", "Undo"):
        button = phone.get_by_role("button", name=name, exact=True)
        box = button.bounding_box()
        assert box["y"] + box["height"] <= 740
        assert box["height"] >= 40  # for a thumb
    light = [
        int(v) for v in re.findall(r"\d+", phone.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    ]
    assert max(light) < 60
    phone.get_by_role("button", name="Right", exact=True).tap()
    ready(phone, 2)
    assert re.match(r"Right\. Next: a very long prompt .*", phone.get_by_role("status").inner_text())
    assert phone.get_by_role("button", name=re.compile("^Left: a very long")).get_attribute("type") == "button"
    assert phone.get_by_label("Your name").input_value() == "ann"
    assert phone.get_by_role("button", name="Undo").get_attribute("aria-keyshortcuts") == "z Backspace"
    settled(phone)


def test_the_keyboard_alone_reaches_everything(visit: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path, 3)
    page = visit(store)
    names = []
    for _ in range(11):
        page.keyboard.press("Tab")
        name = "e => e.getAttribute('aria-label') || (e.firstChild ? e.firstChild.textContent : e.id)"
        names.append(page.evaluate(f"() => ({name})(document.activeElement)").split(":")[0])
    samples = ["Left", "Enlarge or reduce", "Right", "Enlarge or reduce"]
    assert names == [*samples, "Left", "Tie", "Both bad", "Right", "Skip", "Undo", "rater"]
    page.keyboard.type("1 s z")  # a name, and no answers
    assert ready(page) == "1-better"
    page.keyboard.press("Shift+Tab")
    page.wait_for_function("() => localStorage.getItem('scoreact-rater') === '1 s z'")
    height = "() => document.querySelector('#samples img').getBoundingClientRect().height"
    before = page.evaluate(height)
    page.keyboard.press("f")
    assert page.evaluate(height) > before + 50
    page.keyboard.press("Escape")
    assert page.evaluate(height) == before
    for _ in range(5):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # on the button Left, which keeps the focus
    ready(page, 2)
    page.keyboard.press("Space")
    ready(page, 3)
    for _ in range(2):
        page.keyboard.press("Shift+Tab")
    settled(page)
    page.keyboard.press("Enter")  # on the right sample
    page.wait_for_function("() => document.getElementById('prompt').textContent.startsWith('Nothing left')")
    settled(page)
    assert [row["answer"] for row in store.rows("SELECT answer FROM answers ORDER BY id")] == ["left", "left", "right"]
