"""What can be heard in the browser, and when: for the benchmarks that play through the page.

A keyboard takes the place of the browser's MIDI devices, and the sound on its way to the loudspeakers is watched sample
by sample. A time is that of the sample, by the clock of the page: as the browser puts it in relation to what its output
plays, which includes the output's own latency.
"""

from playwright.sync_api import Page

# Run it before the page makes sound. `sound` has the last 0.68 s of it.
WATCH = """(() => {
  const input = { type: 'input', state: 'connected', name: 'A piano', onmidimessage: null };
  navigator.requestMIDIAccess = async () => ({ inputs: new Map([['1', input]]), onstatechange: null });
  window.send = (...data) => input.onmidimessage({ data: Uint8Array.from(data), timeStamp: performance.now() });
  window.wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  let analyser = null, context = null;
  const { connect } = AudioNode.prototype;
  AudioNode.prototype.connect = function (to, ...rest) {
    if (to instanceof AudioDestinationNode && !(this instanceof OscillatorNode)) {
      context = to.context;
      analyser = new AnalyserNode(context, { fftSize: 32768 });
      connect.call(this, analyser);
    }
    return connect.call(this, to, ...rest);
  };
  window.sound = () => {
    const samples = new Float32Array(analyser.fftSize), until = context.currentTime;
    analyser.getFloatTimeDomainData(samples);
    const { contextTime, performanceTime } = context.getOutputTimestamp();
    const heard = (n) => performanceTime + 1000 * (until - (samples.length - n) / context.sampleRate - contextTime);
    return { samples, heard, output: 1000 * context.outputLatency };
  };
  window.loudest = (samples) => samples.reduce((most, each) => Math.max(most, Math.abs(each)), 0);
})()"""
# From silence, press a key of the MIDI keyboard or of the computer, and look for the first sound.
_KEY_TO_SOUND = """async ([way, times]) => {
  const found = [], piano = document.querySelector('#player .keys');
  let pressed = 0;
  piano.addEventListener('keydown', (event) => { pressed ||= event.timeStamp; }, true);
  for (let n = 0; n < times; n++) {
    pressed = way === 'midi' ? performance.now() : 0;
    if (way === 'midi') send(0x90, 60 + (n % 12), 80); else await pressKey();
    await wait(250);
    const { samples, heard, output } = sound();
    if (way === 'midi') send(0x80, 60 + (n % 12), 0);
    const first = samples.findIndex((each) => Math.abs(each) > 1e-4);
    if (first > 0) found.push([heard(first) - pressed, output]);
    await wait(900);
  }
  return found;
}"""
# A phrase, a pause, an answer; while that is loud, a key so soft that only the answer is heard: when does it end?
_TURN = """async ([pause, listen]) => {
  for (const pitch of [60, 64, 67, 72]) {
    send(0x90, pitch, 80);
    await wait(200);
    send(0x80, pitch, 0);
  }
  const paused = performance.now() + pause;
  await wait(pause);
  let began = NaN;
  for (let tries = 0; tries < 200 && Number.isNaN(began); tries++) {
    await wait(50);
    const { samples, heard } = sound();
    const first = samples.findIndex((each, n) => heard(n) > paused && Math.abs(each) > 1e-3);
    if (first >= 0) began = heard(first) - paused;
  }
  await wait(listen);
  let most = 0;
  for (let tries = 0; tries < 100 && most < 0.03; tries++) {
    await wait(30);
    most = loudest(sound().samples.subarray(-4800));
  }
  const pressed = performance.now();
  send(0x90, 48, 1);
  await wait(400);
  const { samples, heard, output } = sound();
  const silent = heard(samples.findLastIndex((each) => Math.abs(each) > most / 316)) - pressed;
  send(0x80, 48, 0);
  await wait(300);
  return { began, silent: most < 0.03 ? NaN : silent, output };
}"""


def connect_keyboard(page: Page) -> None:
    """Let the benchmark play the MIDI keyboard, and wait until there are samples."""
    page.get_by_role("button", name="MIDI keyboard").click()
    page.locator("#player .say", has_text="Listening to A piano").wait_for()
    page.wait_for_timeout(3000)


def key_to_sound(page: Page, way: str, times: int) -> tuple[list[float], list[float]]:
    """Milliseconds from a key to its sound, and how much of that the browser's output takes by its own account.

    Args:
        page: with a connected keyboard.
        way: "midi", counted from the message; or "key", of the computer, counted from the event's own time.
        times: how often.
    """
    page.locator("#player .keys").focus()
    if way == "key":
        page.expose_function("pressKey", lambda: page.keyboard.press("z"))
    heard, output = zip(*page.evaluate(_KEY_TO_SOUND, [way, times]), strict=True)
    return list(heard), list(output)


def duet(page: Page, turns: int, listen_s: float = 2.0) -> list[dict[str, float]]:
    """Play a duet through the page.

    Returns:
        For each turn, in milliseconds: `began`, from the end of the pause to the first sound of the answer; `silent`,
        from a key that goes down while it is loud to its last sound above -50 dB; and `output`, the part of both that
        the browser's output takes by its own account. NaN if there was no such sound.
    """
    page.get_by_role("button", name="Duet", exact=True).click()
    page.locator("#player .say", has_text="When you pause").wait_for(timeout=60_000)
    pause_ms = 1000 * float(page.get_by_label("Answers after").input_value())
    found = [page.evaluate(_TURN, [pause_ms, 1000 * listen_s]) for _ in range(turns)]
    page.get_by_role("button", name="End the duet").click()
    return found
