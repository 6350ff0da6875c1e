"""The timeline and the piano of the page, in a real browser: what is played, continued, looped, kept and taken out."""

import itertools
import json
import socket
from pathlib import Path

import pytest
from web_browser import choose_example, fill, needs_browser, shown, state, status, wait_until, wait_until_done
from web_client import running_page

from music_ar import read_midi

pytestmark = pytest.mark.filterwarnings("ignore")  # from Playwright

# A MIDI keyboard that a test plays, in place of the browser's access to real ones.
KEYBOARD = """(() => {
  const input = { type: 'input', state: 'connected', name: 'Test piano', onmidimessage: null };
  const access = { inputs: new Map([['1', input]]), onstatechange: null };
  navigator.requestMIDIAccess = async () => access;
  window.testPiano = {
    play: (events) => {
      for (const [at, data] of events) input.onmidimessage({ data: Uint8Array.from(data), timeStamp: at });
    },
    unplug: () => { input.state = 'disconnected'; access.onstatechange({ port: input }); },
  };
})()"""
PHRASE = [
    (0, (0x90, 60, 80)), (100, (0xB0, 64, 127)), (250, (0x80, 60, 0)), (333, (0x90, 64, 90)), (400, (0x90, 64, 0)),
    (1001, (0xB0, 64, 0)), (2000, (0x90, 67, 40)), (2400, (0x80, 67, 0)),
]  # fmt: skip


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def said(page):
    return page.locator("#player .say").inner_text()


def connect_keyboard(page):
    page.evaluate(KEYBOARD)
    button(page, "MIDI keyboard").click()
    wait_until(lambda: "Listening to Test piano" in said(page), "the keyboard is there")


def play(page, phrase):
    """Play now; MIDI messages with times in ms."""
    page.evaluate("phrase => testPiano.play(phrase.map(([at, data]) => [performance.now() + at, data]))", phrase)


def record(page, phrase):
    button(page, "● Record").click()
    play(page, phrase)
    page.wait_for_timeout(200)
    button(page, "■ Stop recording").click()
    wait_until(lambda: state(page, "kind") == "prompt", "what was played is the prompt")


def make_a_piece(page, seconds):
    fill(page, "seconds", seconds)
    page.locator("#generate").click()
    wait_until_done(page)
    if state(page, "playing") == "true":
        button(page, "Pause").click()


def taken_out(page, folder) -> Path:
    """The file that is dragged out of the page."""
    dragged = page.evaluate(
        """async () => {
          const data = new DataTransfer(), link = document.querySelector('#player .midi');
          link.dispatchEvent(new DragEvent('dragstart', { dataTransfer: data, bubbles: true }));
          const [kind, name, address] = data.getData('DownloadURL').match(/^([^:]+):([^:]+):(.*)$/).slice(1);
          return { kind, name, bytes: [...new Uint8Array(await (await fetch(address)).arrayBuffer())] };
        }"""
    )
    assert dragged["kind"] == "audio/midi"
    path = folder / dragged["name"]
    path.write_bytes(bytes(dragged["bytes"]))
    return path


@needs_browser
def test_a_phrase_from_a_midi_keyboard_is_recorded_continued_and_kept(page, tmp_path):
    connect_keyboard(page)
    record(page, PHRASE)
    played = read_midi(taken_out(page, tmp_path))
    assert played.onset_s.tolist() == pytest.approx([0, 0.333, 2])
    assert played.offset_s.tolist() == pytest.approx([1.001, 1.001, 2.4]), "the pedal holds the first two"
    assert played.velocity.tolist() == [80, 90, 40]

    fill(page, "seconds", 8)
    page.locator("#generate").click()
    wait_until_done(page)
    piece = read_midi(taken_out(page, tmp_path))
    assert len(piece) == shown(page, "notes") > 3
    assert piece.onset_s[:3].tolist() == pytest.approx([0, 0.333, 2], abs=0.01)
    assert page.get_by_role("radio").count() == 2, "the take and what was played"
    take = state(page, "take")

    page.reload()
    wait_until(lambda: state(page, "take") == take, "the take is there after a reload")
    assert read_midi(taken_out(page, tmp_path)) == piece
    page.get_by_role("radio", name="Played at").click()
    wait_until(lambda: shown(page, "notes") == 3, "so is what was played")
    connect_keyboard(page)
    play(page, [(0, (0x90, 60, 80))])
    page.evaluate("testPiano.unplug()")
    assert "Test piano is gone" in said(page)


@pytest.mark.slow
@needs_browser
def test_too_many_notes_and_stuck_keys_do_no_harm(page, tmp_path):
    connect_keyboard(page)
    flood = [(6 * n, (0x90, 21 + n % 88, 64)) for n in range(10_000)]
    record(page, flood)
    assert shown(page, "notes") == 10_000
    assert len(read_midi(taken_out(page, tmp_path))) == 10_000
    button(page, "Undo recording").click()
    wait_until(lambda: shown(page, "notes") == 0, "the recording is undone")
    button(page, "Restore the deleted take").click()
    wait_until(lambda: page.get_by_role("radio", name="Played at").count() == 1, "and back")


@pytest.mark.slow
@needs_browser
def test_the_computers_keys_and_fingers_play(page, tmp_path):
    keys = page.locator("#player .keys")
    button(page, "● Record").click()
    for key in "zsx":  # C, C sharp, D
        page.keyboard.press(key, delay=30)
    page.keyboard.down(" ")
    wait_until(lambda: page.locator("#player .pedal").get_attribute("aria-pressed") == "true", "the pedal is down")
    page.keyboard.press("q", delay=30)
    page.keyboard.up(" ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("z", delay=30)
    box = keys.bounding_box()
    # Two fingers, on the first white key and on another.
    for kind, pointer, x in (("down", 7, 5), ("down", 8, box["width"] - 5), ("up", 7, 5), ("up", 8, box["width"] - 5)):
        keys.dispatch_event(
            f"pointer{kind}",
            {
                "pointerId": pointer,
                "pointerType": "touch",
                "clientX": box["x"] + x,
                "clientY": box["y"] + 0.9 * box["height"],
                "bubbles": True,
            },
        )
    wait_until(lambda: shown(page, "notes") == 7, "seven notes are there")
    button(page, "■ Stop recording").click()
    wait_until(lambda: state(page, "kind") == "prompt", "they are the prompt")
    played = read_midi(taken_out(page, tmp_path))
    assert played.pitch[:5].tolist() == [48, 49, 50, 60, 60], "arrow right is an octave higher"


@pytest.mark.slow
@needs_browser
def test_the_view_zooms_around_the_pointer_and_scrolls(page):
    choose_example(page)
    make_a_piece(page, 20)
    roll = page.locator("#player .roll")
    box = roll.bounding_box()
    whole = shown(page, "span")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -60)
    page.keyboard.up("Control")
    wait_until(lambda: shown(page, "span") < whole, "it zooms in")
    middle = shown(page, "from") + shown(page, "span") / 2
    assert middle == pytest.approx(whole / 2, abs=0.5), "around the pointer"
    before = shown(page, "from")
    page.mouse.wheel(100, 0)
    wait_until(lambda: shown(page, "from") > before, "it scrolls")
    roll.focus()
    page.keyboard.press("0")
    wait_until(lambda: shown(page, "span") == whole, "all is shown")


@needs_browser
def test_a_click_seeks_and_a_region_loops(page):
    choose_example(page)
    make_a_piece(page, 20)
    roll = page.locator("#player .roll")
    box, whole = roll.bounding_box(), shown(page, "span")
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 50)
    wait_until(lambda: abs(shown(page, "position") - whole / 2) < 0.3, "a click seeks")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 15, box["y"] + 50, steps=3)
    page.mouse.up()
    button(page, "Loop").click()
    button(page, "Play").click()
    start, end = (float(edge.get_attribute("aria-valuenow")) for edge in page.locator("#player .edge").all())
    positions = []
    for _ in range(60):
        positions.append(shown(page, "position"))
        page.wait_for_timeout(30)
    assert min(positions) >= start - 0.05
    assert max(positions) <= end + 0.05
    assert any(b < a for a, b in itertools.pairwise(positions)), "it goes round"
    button(page, "Pause").click()


@needs_browser
def test_it_continues_from_the_playhead(page, tmp_path):
    choose_example(page)
    make_a_piece(page, 20)
    roll = page.locator("#player .roll")
    old = read_midi(taken_out(page, tmp_path))
    roll.focus()
    page.keyboard.press("Home")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    wait_until(lambda: shown(page, "position") == 30, "the playhead is at 30 s")
    button(page, "Continue from here").click()
    wait_until(lambda: state(page, "generating") == "true" or "of music" in status(page), "it goes on")
    wait_until_done(page)
    wait_until(lambda: abs(shown(page, "span") - 60) < 1.5, "30 s were added")
    new = read_midi(taken_out(page, tmp_path))
    kept = old.onset_s < 29.9
    assert new.onset_s[: kept.sum()].tolist() == pytest.approx(old.onset_s[kept].tolist(), abs=0.011)
    assert page.get_by_role("radio").count() == 3, "the earlier take is kept"


@needs_browser
def test_a_duet_answers_falls_silent_and_is_kept(page, tmp_path):
    connect_keyboard(page)
    button(page, "Duet").click()
    wait_until(lambda: "When you pause" in said(page), "the server listens")
    page.get_by_label("Answers after").fill("0.5")
    play(page, [(0, (0x90, 60, 80)), (200, (0x80, 60, 0))])
    wait_until(lambda: shown(page, "notes") > 3, "it answers")
    silenced_ms = page.evaluate(
        """async () => {
          const player = document.querySelector('#player .player'), frame = () => new Promise(requestAnimationFrame);
          const began = performance.now();
          testPiano.play([[began, [0x90, 72, 90]]]);
          const notes = () => Number(player.dataset.notes);
          await frame();
          const told = performance.now() - began, heard = notes();
          await new Promise((resolve) => setTimeout(resolve, 400));
          return notes() <= heard + 1 ? told : Infinity;
        }"""
    )
    assert silenced_ms < float("inf"), "playing silences it"
    play(page, [(0, (0x80, 72, 0))])
    before = shown(page, "notes")
    wait_until(lambda: shown(page, "notes") > before + 2, "it answers again")
    button(page, "■ End the duet").click()
    wait_until(lambda: state(page, "take").startswith("duet-"), "the duet is a take")
    duet = read_midi(taken_out(page, tmp_path))
    assert 80 in duet.velocity[duet.pitch == 60], "what was played is in it"
    assert len(duet) == shown(page, "notes") > before
    wait_until(lambda: page.locator("#extend").is_enabled(), "the server has it too")
    fill(page, "seconds", 5)
    page.locator("#extend").click()
    wait_until_done(page)
    assert shown(page, "notes") > len(duet)
    take = state(page, "take")
    page.reload()
    wait_until(lambda: state(page, "take") == take, "all is there after a reload")
    assert page.get_by_role("radio", name="Duet at").count() == 1


def answered(page, pause_s=0.3):
    """Play a key in a duet, and wait until some notes of an answer are heard."""
    before = shown(page, "notes")
    page.get_by_label("Answers after").fill(str(pause_s))
    page.get_by_label("Answers after").dispatch_event("change")
    play(page, [(0, (0x90, 60, 80)), (100, (0x80, 60, 0))])
    wait_until(lambda: shown(page, "notes") > before + 3, "it answers")


# Keeps what the page sends to the server in a duet.
LISTEN = """(() => {
  const send = WebSocket.prototype.send;
  window.sent = [];
  WebSocket.prototype.send = function (text) { window.sent.push(text); return send.call(this, text); };
})()"""


@needs_browser
def test_a_duet_goes_on_after_a_reload(page):
    connect_keyboard(page)
    button(page, "Duet").click()
    wait_until(lambda: "When you pause" in said(page), "the server listens")
    answered(page)
    page.add_init_script(LISTEN)
    page.reload()
    wait_until(lambda: "The duet goes on" in said(page), "the server still has it")
    assert state(page, "duet") == "true"
    notes = shown(page, "notes")
    assert notes > 3, "all is still there"
    first = json.loads(page.evaluate("sent[0]"))
    assert (first["type"], len(first["timeline"]["played"])) == ("open", 2)
    assert first["session"], "the server need not read it again"
    connect_keyboard(page)
    answered(page)
    button(page, "■ End the duet").click()
    wait_until(lambda: state(page, "take").startswith("duet-"), "the duet is a take")
    assert shown(page, "notes") > notes
    assert page.get_by_role("radio", name="Duet at").count() == 1, "one, not two"
    page.reload()
    wait_until(lambda: str(state(page, "take")).startswith("duet-"), "an ended duet is a take")
    assert state(page, "duet") == "false"


@pytest.mark.slow
@needs_browser
def test_a_duet_goes_on_after_the_server_was_restarted(browser, tiny_checkpoint, tmp_path):
    page = browser.new_context().new_page()
    with socket.socket() as probe:  # not one that another server takes meanwhile
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with running_page(tiny_checkpoint, tmp_path, "--port", port) as served:
        page.goto(served.address)
        connect_keyboard(page)
        button(page, "Duet").click()
        wait_until(lambda: "When you pause" in said(page), "the server listens")
        answered(page)
    wait_until(lambda: "connection to the server is lost" in said(page), "the loss is said")
    play(page, [(0, (0x90, 62, 80)), (100, (0x80, 62, 0))])
    with running_page(tiny_checkpoint, tmp_path, "--port", port):
        wait_until(lambda: "The server no longer had the duet" in said(page), "so is what happened")
        answered(page)
        page.reload()
        wait_until(lambda: "The duet goes on" in said(page), "the new server has it")
        connect_keyboard(page)
        answered(page)
        button(page, "■ End the duet").click()
        wait_until(lambda: state(page, "take").startswith("duet-"), "the duet is a take")
    page.context.close()


@pytest.mark.slow
@needs_browser
def test_takes_are_compared_starred_made_again_and_deleted(page):
    fill(page, "seconds", 5)
    for count in (1, 2):
        page.locator("#generate").click()
        wait_until(lambda count=count: page.get_by_role("radio").count() == count, "the take is listed")
        wait_until_done(page)
    first, second = (page.get_by_role("radio").nth(n) for n in (1, 0))
    assert second.get_attribute("aria-checked") == "true"
    wait_until(lambda: state(page, "playing") == "true", "it plays")
    at = shown(page, "position")
    first.click()
    wait_until(lambda: first.get_attribute("aria-checked") == "true", "the other is shown")
    wait_until(lambda: state(page, "playing") == "true", "and plays on")
    assert shown(page, "position") >= at - 0.1, "from the same position"
    seed = first.inner_text().split("\n")[0].removeprefix("Seed ")
    wait_until(lambda: f"seed {seed}" in status(page), "the server knows")
    page.get_by_role("button", name=f"Star Seed {seed}").click()
    page.get_by_role("button", name="Make again with another seed:").first.click()
    wait_until(lambda: page.get_by_role("radio").count() == 3, "a third is made")
    wait_until_done(page)
    page.get_by_role("button", name="Delete").first.click()
    wait_until(lambda: page.get_by_role("radio").count() == 2, "one is deleted")
    assert page.get_by_role("button", name=f"Remove the star from Seed {seed}").count() == 1


@pytest.mark.slow
@needs_browser
def test_a_link_carries_a_short_prompt(page, address):
    connect_keyboard(page)
    record(page, PHRASE)
    fill(page, "seconds", 5)
    page.locator("#generate").click()
    wait_until_done(page)
    link = page.locator("#status a").get_attribute("href")
    assert "notes=" in link
    other = page.context.new_page()
    other.goto(f"{address.rstrip('/')}/{link}")
    other.wait_for_selector('#player .player[data-notes="3"][data-kind="prompt"]')
    assert float(other.locator("#seconds input").input_value()) == 5


@pytest.mark.slow
@needs_browser
def test_axe_finds_no_serious_fault(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    make_a_piece(page, 5)
    for scheme in ("light", "dark"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
        page.wait_for_timeout(300)
        found = axe.run(page).response["violations"]
        serious = [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found if each["impact"] != "minor"]
        assert serious == [], scheme


@needs_browser
def test_everything_has_a_name_and_a_role(page):
    choose_example(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('#player button, #player input, #player [tabindex], #player a[href]')]
          .filter((each) => !each.getAttribute('aria-label') && !each.textContent.trim() && !each.labels?.length)
          .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("#roll-summary").inner_text() == "139 notes in 0:24."
    for width in (1360, 390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"no sideways scroll at {width} px"
