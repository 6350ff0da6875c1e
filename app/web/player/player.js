// The player: a piano roll on a canvas, played by the `Piano` of piano.js. Both run as `js_on_load` of a gr.HTML, which
// provides `element`, `props`, `trigger` and `watch`. app/web/player/__init__.py describes `props.value`.

const root = element.querySelector('.player');
const find = (name) => root.querySelector('.' + name);
const [playButton, roll, strips, time, count, waiting] =
  ['play', 'roll', 'strips', 'time', 'count', 'waiting'].map(find);

function clock(exact) { // as app/console.py writes it
  const seconds = Math.floor(exact + 0.5), hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
  const rest = String(seconds % 60).padStart(2, '0');
  return hours ? `${hours}:${String(minutes).padStart(2, '0')}:${rest}` : `${minutes}:${rest}`;
}

// All players of the page share one piano.
const piano = (window.musicArPiano ??= new Piano(root.dataset.samples));
for (const gesture of ['pointerdown', 'keydown']) document.addEventListener(gesture, () => piano.ready());

// ---------------------------------------------------------------- music from Python

let piece = null; // number of the piece shown
let state = { kind: root.dataset.kind, join: 0, generating: false, start: 0, end: 0, variations: [] };
let variations = []; // {seed, until, text, final: [note], notes: [note]}, notes sorted by onset
let chosen = 0;
let generating = false;
let startWithNotes = false; // playback starts as soon as there are notes
let dirty = true;

const calm = window.matchMedia('(prefers-reduced-motion: reduce)');
const PROMPT_LEAD_S = 4; // playback starts this long before the end of the prompt
const empty = { seed: null, until: 0, text: '', final: [], notes: [] };
const current = () => variations[chosen] ?? empty;

function parse(text) {
  return text.split(';').slice(0, -1).map((row) => {
    const [onset, length, pitch, velocity] = row.split(',').map(Number);
    return { on: onset / 1000, off: (onset + length) / 1000, pitch, velocity };
  });
}

function receive() {
  const value = props.value;
  if (!value || typeof value !== 'object') return;
  const fresh = value.piece !== piece, was = ending(), count = variations.length;
  if (fresh) { pause(); variations = []; position = 0; chosen = 0; startWithNotes = false; piece = value.piece; }
  state = value;
  variations = value.variations.map(({ seed, until, notes, open }, number) => {
    const before = variations[number];
    const grows = before && notes.startsWith(before.text);
    const final = grows ? before.final.concat(parse(notes.slice(before.text.length))) : parse(notes);
    // Notes that reach the end of the known music may last longer: their ends are not known yet.
    const rest = parse(open).map((note) => ({ ...note, held: value.generating && note.off >= until - 0.02 }));
    return { seed, until, text: notes, final, notes: final.concat(rest) };
  });
  // Within a piece the choice made here counts: the server may have sent this before it heard of it.
  if (fresh || variations.length !== count) chosen = value.chosen ?? 0;
  position = Math.min(position, ending());
  const begins = value.autoplay && (fresh || !generating);
  generating = value.generating;
  // A new piece plays from shortly before the end of its prompt, an extension from shortly before the old end.
  if (begins) {
    startWithNotes = true;
    if (!playing) position = Math.max(0, fresh ? value.join - PROMPT_LEAD_S : was - 2);
  }
  if (startWithNotes && current().notes.length) { startWithNotes = false; play(); }
  if (playing) settle();
  buildStrips();
  dirty = true;
}

const ending = () => current().until;
const longest = () => Math.max(1, ...variations.map((variation) => variation.until));

// ---------------------------------------------------------------- playing

let playing = false, position = 0, startedAt = 0, startedFrom = 0, next = 0;
const voices = new Map(); // "onset pitch" -> voice, for notes without a scheduled release

function now() {
  return playing && startedAt !== null ? startedFrom + Math.max(0, piano.context.currentTime - startedAt) : position;
}

function play() {
  if (playing || !current().notes.length) return;
  piano.ready();
  window.dispatchEvent(new CustomEvent('music-ar-play', { detail: root }));
  if (!state.generating && position >= current().until - 0.05) position = state.kind === 'prompt' ? state.start : 0;
  playing = true;
  startedAt = null;
  tick();
}

function stop() {
  if (!playing) return;
  position = now();
  playing = false;
  silence();
  dirty = true;
}

function silence() {
  for (const voice of voices.values()) if (voice) piano.release(voice, piano.context.currentTime, 0.03);
  voices.clear();
}

function seek(seconds) {
  const was = playing;
  pause();
  position = Math.max(0, Math.min(seconds, ending()));
  if (was) play();
  dirty = true;
}

function key(note) { return `${note.on} ${note.pitch}`; }

// Schedules the release of sounding notes whose ends have become known.
function settle() {
  for (const note of current().notes) if (!note.held) releaseAtEnd(note);
}

function releaseAtEnd(note) {
  const voice = voices.get(key(note));
  if (!voice || startedAt === null) return;
  voices.delete(key(note));
  const when = Math.max(piano.context.currentTime, startedAt + note.off - startedFrom);
  piano.release(voice, when);
  ringing.push({ voice, until: when });
}

let ringing = []; // voices with a scheduled release, which a pause must bring forward
function cutRinging() {
  for (const { voice } of ringing) piano.release(voice, piano.context.currentTime, 0.03);
  ringing = [];
}

function tick() {
  if (!playing) return;
  const { until, notes } = current();
  const end = state.kind === 'prompt' ? Math.min(until, state.end || until) : until;
  if (startedAt === null) { // about to start, or waiting for more music
    const enough = !state.generating || until - position > 1.5;
    if (enough && piano.buffers.size > 3) {
      startedAt = piano.context.currentTime + 0.06;
      startedFrom = position;
      next = notes.findIndex((note) => note.on >= position - 0.005);
      if (next < 0) next = notes.length;
    }
    waiting.hidden = Boolean(enough);
    return;
  }
  const at = now();
  if (at >= end) {
    position = end;
    if (state.generating) { startedAt = null; waiting.hidden = false; return; }
    if (at >= end + 0.3) { stop(); position = end; return; }
  }
  const ahead = document.hidden ? 1.6 : 0.25; // seconds; browsers run the timers of hidden pages once a second
  while (next < notes.length && notes[next].on < Math.min(at + ahead, end)) {
    const note = notes[next++];
    voices.set(key(note), piano.strike(note.pitch, note.velocity, Math.max(0, startedAt + note.on - startedFrom)));
    if (!note.held) releaseAtEnd(note);
  }
  ringing = ringing.filter(({ until: ends }) => ends > piano.context.currentTime);
}

setInterval(tick, 40);
window.addEventListener('music-ar-play', (event) => { if (event.detail !== root) pause(); });

function pause() { stop(); cutRinging(); }
function toggle() { playing ? pause() : play(); }

// ---------------------------------------------------------------- drawing

const drag = { from: null, to: null, x: 0 };
let view = { from: 0, span: 10 };

function colours() {
  const style = getComputedStyle(root);
  const pick = (name) => style.getPropertyValue(name).trim();
  return { prompt: pick('--prompt-note'), generated: pick('--generated-note'), sounding: pick('--sounding-note'),
    text: pick('--body-text-color-subdued'), line: pick('--border-color-primary'), shade: pick('--background-fill-secondary') };
}

function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext('2d');
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function range(notes) {
  let [low, high] = [48, 84];
  for (const { pitch } of notes) { low = Math.min(low, pitch); high = Math.max(high, pitch); }
  return [low - 2, high + 2];
}

function drawNotes(pen, notes, width, height, from, span, ink, at) {
  const [low, high] = range(notes);
  const tall = height / (high - low + 1);
  for (const note of notes) {
    if (note.off < from || note.on > from + span) continue;
    const x = ((note.on - from) / span) * width;
    const wide = Math.max(1.5, ((note.off - note.on) / span) * width - 0.5);
    const sounds = at !== null && note.on <= at && at < note.off;
    pen.fillStyle = sounds ? ink.sounding : note.on < state.join - 0.005 || state.kind === 'prompt' ? ink.prompt : ink.generated;
    pen.globalAlpha = 0.45 + 0.55 * Math.min(1, note.velocity / 100);
    pen.beginPath();
    pen.roundRect(x, (high - note.pitch) * tall, wide, Math.max(2, tall - 1), Math.min(2, tall / 3));
    pen.fill();
  }
  pen.globalAlpha = 1;
}

function drawRoll() {
  const { pen, width, height } = prepare(roll);
  if (!width) return;
  const ink = colours(), at = now(), whole = Math.max(ending(), state.generating ? 10 : 1);
  pen.textAlign = 'left';
  if (!current().notes.length) {
    pen.font = '14px sans-serif';
    pen.textAlign = 'center';
    pen.fillStyle = ink.text;
    return pen.fillText(state.message ?? '', width / 2, height / 2, width - 16);
  }
  const most = state.kind === 'prompt' ? whole : Math.max(12, width / 22);
  view = { from: 0, span: Math.min(whole, most) };
  // The roll moves along with the music, or page by page for those who prefer little motion.
  const from = calm.matches ? Math.floor(at / (0.9 * most)) * 0.9 * most : at - 0.35 * most;
  if (whole > most) view.from = Math.max(0, Math.min(from, whole - most));
  const bottom = height - 18;
  const x = (seconds) => ((seconds - view.from) / view.span) * width;

  if (state.kind !== 'prompt' && state.join > view.from) {
    pen.fillStyle = ink.shade;
    pen.fillRect(0, 0, x(state.join), bottom);
  }
  const step = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600].find((s) => (s / view.span) * width >= 60) ?? 1200;
  pen.font = '11px sans-serif';
  pen.lineWidth = 1;
  for (let tickAt = Math.ceil(view.from / step) * step; tickAt <= view.from + view.span; tickAt += step) {
    pen.strokeStyle = ink.line;
    pen.beginPath(); pen.moveTo(x(tickAt), 0); pen.lineTo(x(tickAt), bottom); pen.stroke();
    pen.fillStyle = ink.text;
    if (x(tickAt) < width - 26) pen.fillText(step < 1 ? tickAt.toFixed(1) : clock(tickAt), x(tickAt) + 3, height - 5);
  }
  drawNotes(pen, current().notes, width, bottom, view.from, view.span, ink, playing ? at : null);
  if (state.kind === 'prompt') {
    const [a, b] = drag.from === null ? [state.start, state.end] : [Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)];
    pen.fillStyle = ink.shade;
    pen.globalAlpha = 0.82;
    pen.fillRect(0, 0, x(a), bottom);
    pen.fillRect(x(b), 0, width - x(b), bottom);
    pen.globalAlpha = 1;
    pen.fillStyle = ink.generated;
    pen.fillRect(Math.max(0, x(a) - 1), 0, 3, bottom);
    pen.fillRect(Math.min(width - 3, x(b) - 1), 0, 3, bottom);
  } else if (state.join > view.from && current().notes.length) {
    pen.fillStyle = ink.generated;
    pen.fillRect(x(state.join) - 0.5, 0, 1.5, bottom);
    pen.fillStyle = ink.text;
    if (x(state.join) > 50) pen.fillText('prompt', Math.max(4, x(state.join) - 44), 13);
  }
  if (state.generating && x(current().until) < width) {
    pen.strokeStyle = ink.generated;
    pen.setLineDash([3, 3]);
    pen.beginPath(); pen.moveTo(x(current().until), 0); pen.lineTo(x(current().until), bottom); pen.stroke();
    pen.setLineDash([]);
  }
  pen.fillStyle = ink.sounding;
  pen.fillRect(x(at) - 1, 0, 2, bottom);
}

function buildStrips() {
  const wanted = state.kind !== 'prompt' && variations.length > 1 ? variations.length : 0;
  while (strips.children.length > wanted) strips.lastChild.remove();
  while (strips.children.length < wanted) {
    const number = strips.children.length;
    const strip = document.createElement('button');
    strip.type = 'button';
    strip.className = 'strip';
    strip.setAttribute('role', 'radio');
    strip.append(document.createElement('span'), document.createElement('canvas'));
    strip.addEventListener('click', () => choose(number));
    strips.append(strip);
  }
  [...strips.children].forEach((strip, number) => {
    strip.setAttribute('aria-checked', String(number === chosen));
    strip.tabIndex = number === chosen ? 0 : -1; // arrow keys reach the others, as in any radio group
    strip.firstChild.textContent = `${number + 1} · seed ${variations[number].seed}`;
    const { pen, width, height } = prepare(strip.lastChild);
    drawNotes(pen, variations[number].notes, width, height, 0, longest(), colours(), null);
  });
}

function choose(number) { // another variation, at the same position
  const at = now(), was = playing;
  pause();
  chosen = number;
  position = Math.min(at, current().until);
  trigger('choose', { variation: number, at: performance.now() });
  buildStrips();
  if (was) play();
  dirty = true;
}

function chooseNext(step) {
  const strip = strips.children[chosen + step];
  if (!strip) return;
  choose(chosen + step);
  strip.focus();
}

function draw() {
  if (!root.isConnected) return;
  if (playing || dirty) {
    dirty = false;
    const at = now(), whole = ending(), noteCount = current().notes.length;
    root.dataset.notes = noteCount;
    root.dataset.position = at.toFixed(2);
    root.dataset.playing = playing && startedAt !== null;
    root.dataset.generating = Boolean(state.generating);
    root.dataset.generated = state.kind === 'piece' && current().notes.some((note) => note.on >= state.join);
    playButton.textContent = playing ? '❚❚' : '▶';
    playButton.setAttribute('aria-label', `${playing ? 'Pause' : 'Play'} the ${state.kind}`);
    playButton.disabled = !noteCount;
    time.textContent = `${clock(at)} / ${clock(whole)}`;
    count.textContent = noteCount ? `${noteCount.toLocaleString('en')} notes` : '';
    if (!playing) waiting.hidden = true;
    roll.setAttribute('aria-valuemax', whole.toFixed(1));
    roll.setAttribute('aria-valuenow', at.toFixed(1));
    roll.setAttribute('aria-valuetext', `${clock(at)} of ${clock(whole)}, ${noteCount} notes`);
    drawRoll();
    placeEdges();
  }
  requestAnimationFrame(draw);
}

// ---------------------------------------------------------------- the selected part of a prompt

const LEAST_PART_S = 0.2;

let telling = 0;
function select(start, end, heardFrom) {
  state = { ...state, start, end };
  seek(heardFrom);
  clearTimeout(telling);
  telling = setTimeout(() => trigger('crop', { start, end }), 150); // not for each step of a key that is held down
  dirty = true;
}

function placeEdges() {
  if (state.kind !== 'prompt') return;
  for (const edge of root.querySelectorAll('.edge')) {
    const at = state[edge.dataset.edge], start = edge.dataset.edge === 'start';
    edge.style.left = `${(100 * (at - view.from)) / view.span}%`;
    edge.setAttribute('aria-valuemin', start ? 0 : state.start);
    edge.setAttribute('aria-valuemax', start ? state.end : ending());
    edge.setAttribute('aria-valuenow', at);
    edge.setAttribute('aria-valuetext', `${at.toFixed(1)} of ${ending().toFixed(1)} seconds`);
  }
}

// An edge moves by 0.1 s, and by 1 s with Shift or Page Up and Page Down.
const strides = { ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1, PageDown: -1, PageUp: 1,
  Home: -Infinity, End: Infinity };
function moveEdge(edge, event) {
  const by = strides[event.key] * (event.shiftKey ? 10 : 1);
  const [least, most] = edge === 'start' ? [0, state.end - LEAST_PART_S] : [state.start + LEAST_PART_S, ending()];
  const to = Math.round(10 * Math.max(least, Math.min(state[edge] + by, most))) / 10;
  const { start, end } = { ...state, [edge]: to };
  select(start, end, edge === 'start' ? start : Math.max(start, end - 2)); // play what leads to the edge
}

// ---------------------------------------------------------------- mouse, touch and keyboard

const secondsAt = (event) => {
  const box = roll.getBoundingClientRect();
  const seconds = view.from + ((event.clientX - box.left) / box.width) * view.span;
  return Math.max(0, Math.min(seconds, ending()));
};
roll.addEventListener('pointerdown', (event) => {
  roll.setPointerCapture(event.pointerId);
  drag.x = event.clientX;
  drag.pressed = true;
});
roll.addEventListener('pointermove', (event) => {
  if (!drag.pressed || state.kind !== 'prompt') return;
  if (drag.from === null && Math.abs(event.clientX - drag.x) > 5) drag.from = secondsAt({ clientX: drag.x });
  if (drag.from !== null) { drag.to = secondsAt(event); dirty = true; }
});
roll.addEventListener('pointerup', (event) => {
  if (!drag.pressed) return;
  drag.pressed = false;
  if (drag.from === null) return seek(secondsAt(event));
  const [start, end] = [Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)].map((s) => Math.round(s * 10) / 10);
  drag.from = drag.to = null;
  if (end - start >= LEAST_PART_S) select(start, end, start);
  dirty = true;
});
roll.addEventListener('pointercancel', () => { drag.pressed = false; drag.from = null; dirty = true; });
playButton.addEventListener('click', () => { window.musicArLast = root; toggle(); });
root.addEventListener('pointerdown', () => { window.musicArLast = root; });

const keys = { ' ': toggle, ArrowLeft: () => seek(now() - 5), ArrowRight: () => seek(now() + 5),
  Home: () => seek(0), End: () => seek(ending()) };
const stripKeys = { ArrowUp: () => chooseNext(-1), ArrowDown: () => chooseNext(1) };
document.addEventListener('keydown', (event) => {
  const target = event.target;
  const mine = root.contains(target);
  const edge = target.dataset?.edge;
  const idle = target === document.body && (window.musicArLast ?? document.querySelector('.player.piece')) === root;
  const act = edge && event.key in strides ? () => moveEdge(edge, event)
    : strips.contains(target) && stripKeys[event.key] || keys[event.key];
  if (!(mine || idle) || !act || event.ctrlKey || event.metaKey || event.altKey) return;
  if (mine && target.tagName === 'BUTTON' && event.key === ' ') return; // the button handles it
  event.preventDefault();
  act();
});

new ResizeObserver(() => { buildStrips(); dirty = true; }).observe(root);
new MutationObserver(() => { dirty = true; }).observe(document.body, { attributes: true, attributeFilter: ['class'] });
watch('value', receive);
receive();
draw();
