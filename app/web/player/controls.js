// Connects the buttons, keys, mouse and fingers to the player.

import { dragOut } from './drag_out.js';
import { LEAST_REGION_S, listen } from './gestures.js';
import { connectMidi } from './midi_input.js';

/** @typedef {import('./player.js').Player} Player */

/** @param {Player} player */
export function connect(player) {
  listen(player.canvas('roll'), player.viewport, {
    seek: (seconds) => player.seek(seconds),
    selecting: (from, to, done) => player.select(from, to, done),
    moved: () => player.face.touch(),
  });
  for (const gesture of ['pointerdown', 'keydown']) document.addEventListener(gesture, () => player.piano.ready());
  connectButtons(player);
  connectSliders(player);
  window.addEventListener('music-ar-settings', (event) => {
    const [names, values] = /** @type {CustomEvent<[string[], number[]]>} */ (event).detail;
    player.duet.settings = Object.fromEntries(names.map((name, number) => [name, values[number]]));
  });
  player.root.addEventListener('extend', () => { player.extend(); });
  document.addEventListener('keydown', (event) => keyDown(player, event));
  for (const edge of player.edges()) {
    edge.addEventListener('keydown', (event) => moveEdge(player, edge, event));
    edge.addEventListener('pointerdown', (event) => edge.setPointerCapture(event.pointerId));
    for (const kind of /** @type {const} */ (['pointermove', 'pointerup']))
      edge.addEventListener(kind, (event) => dragEdge(player, edge, event));
  }
  window.addEventListener('pagehide', () => { if (player.recording.active) player.recording.stop(performance.now()); });
  dragOut(/** @type {HTMLAnchorElement} */ (player.find('midi')), () => ({
    name: `music-ar-${player.shown.seed ?? 'played'}.mid`, content: player.shelf.file(player.shown),
  }));
}

/** @param {Player} player */
function connectButtons(player) {
  const zoom = (/** @type {number} */ factor) => player.viewport.zoom(player.playback.position, factor);
  /** @type {Record<string, () => void>} */
  const buttons = {
    play: () => player.toggle(), continue: () => { player.continueHere(); }, fill: () => { player.fill(); }, loop: () => player.setLoop(!player.loops),
    in: () => zoom(1.5), out: () => zoom(1 / 1.5), all: () => player.viewport.showAll(),
    record: () => player.record(), again: () => { player.discard(); player.record(); }, discard: () => player.discard(), duet: () => player.playDuet(),
    connect: () => { connectMidi(player.instrument, (message) => player.tell(message)); },
    lower: () => player.keys.shift(-1), higher: () => player.keys.shift(1),
    pedal: () => player.instrument.pedal(!player.instrument.pedalDown, performance.now()), restore: () => player.shelf.restore(),
  };
  for (const [name, act] of Object.entries(buttons)) player.button(name).addEventListener('click', () => { act(); player.face.touch(); });
}

/** @param {Player} player */
function connectSliders(player) {
  const [volume, tempo, transpose] = ['volume', 'tempo', 'transpose'].map((name) => player.input(name));
  volume.addEventListener('input', () => { player.piano.volume = Number(volume.value); });
  tempo.addEventListener('input', () => {
    player.playback.tempo = Number(tempo.value);
    player.find('percent').textContent = `${Math.round(100 * player.playback.tempo)} %`;
  });
  const pause = player.input('pause-s');
  pause.addEventListener('change', () => player.duet.setPause(Number(pause.value) || 0.8));
  transpose.addEventListener('input', () => {
    player.playback.transpose = Math.max(-12, Math.min(Math.round(Number(transpose.value)) || 0, 12));
    player.face.touch();
  });
}

/** @param {Player} player @param {KeyboardEvent} event */
function keyDown(player, event) {
  const target = /** @type {Element} */ (event.target), mine = player.root.contains(target);
  if (!(mine || target === document.body) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.matches('input, .edge') || (target.matches('button, a') && event.key === ' ')) return;
  const act = everywhere(player)[event.key] ?? (target === player.canvas('roll') ? onTheRoll(player)[event.key] : undefined);
  if (!act) return;
  event.preventDefault();
  act();
  player.face.touch();
}

/** @param {Player} player @returns {Record<string, () => void>} */
const everywhere = (player) => ({
  ' ': () => player.toggle(),
  ArrowLeft: () => player.seek(player.playback.position - 5), ArrowRight: () => player.seek(player.playback.position + 5),
  Home: () => player.seek(0), End: () => player.seek(player.shown.until),
});

/** Keys that elsewhere would be in the way of typing, or of a screen reader. @param {Player} player @returns {Record<string, () => void>} */
const onTheRoll = (player) => ({
  '+': () => player.button('in').click(), '=': () => player.button('in').click(), '-': () => player.button('out').click(),
  0: () => player.button('all').click(), l: () => player.button('loop').click(),
  '[': () => player.select(player.playback.position, player.region?.to ?? player.shown.until, true),
  ']': () => player.select(player.region?.from ?? 0, player.playback.position, true),
  PageUp: () => player.viewport.scroll(-0.8 * player.viewport.span), PageDown: () => player.viewport.scroll(0.8 * player.viewport.span),
  Escape: () => player.select(0, 0, true),
});

/** @param {Player} player @param {HTMLElement} edge @param {PointerEvent} event */
function dragEdge(player, edge, event) {
  if (!player.region || (event.type === 'pointermove' && !edge.hasPointerCapture(event.pointerId))) return;
  const box = player.canvas('roll').getBoundingClientRect(), at = player.viewport.seconds(event.clientX - box.left, box.width);
  const { from, to } = player.region, done = event.type === 'pointerup';
  if (edge.dataset.edge === 'from') player.select(Math.min(at, to - LEAST_REGION_S), to, done);
  else player.select(from, Math.max(at, from + LEAST_REGION_S), done);
}

/** @type {Record<string, number>} seconds by which a key moves an edge; ten times as much with Shift */
const STRIDES = {
  ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1, PageDown: -1, PageUp: 1, Home: -Infinity, End: Infinity,
};

/** @param {Player} player @param {HTMLElement} edge @param {KeyboardEvent} event */
function moveEdge(player, edge, event) {
  const by = STRIDES[event.key] * (event.shiftKey ? 10 : 1), { region } = player, isStart = edge.dataset.edge === 'from';
  if (!region || Number.isNaN(by)) return;
  event.preventDefault();
  const [least, most] = isStart ? [0, region.to - LEAST_REGION_S] : [region.from + LEAST_REGION_S, player.shown.until];
  const to = Math.max(least, Math.min((isStart ? region.from : region.to) + by, most));
  if (isStart) return player.select(to, region.to, true);
  player.select(region.from, to, true);
  player.seek(Math.max(region.from, to - 2)); // play what leads to the edge
}
