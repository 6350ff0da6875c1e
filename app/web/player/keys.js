// The piano below the timeline: lit by what sounds, played by fingers, mouse and the computer's keys.

import { prepare } from './roll.js';

/** @typedef {import('./instrument.js').Instrument} Instrument */

const BLACK = new Set([1, 3, 6, 8, 10]);
const LOWEST = 21, HIGHEST = 108;
const LEAST_KEY_PX = 13; // of a white key, with the mouse
const LEAST_TOUCHED_PX = 26;
// By the place of a key on the keyboard, whatever is printed on it: two rows of white keys, the black ones above each.
const LOWER = ['KeyZ', 'KeyS', 'KeyX', 'KeyD', 'KeyC', 'KeyV', 'KeyG', 'KeyB', 'KeyH', 'KeyN', 'KeyJ', 'KeyM', 'Comma', 'KeyL', 'Period', 'Semicolon', 'Slash'];
const UPPER = ['KeyQ', 'Digit2', 'KeyW', 'Digit3', 'KeyE', 'KeyR', 'Digit5', 'KeyT', 'Digit6', 'KeyY', 'Digit7', 'KeyU', 'KeyI', 'Digit9', 'KeyO', 'Digit0', 'KeyP', 'BracketLeft', 'Equal', 'BracketRight'];

/**
 * The pitch of a key of the computer's keyboard; undefined if it is none.
 * @param {string} code
 * @param {number} octave from -3 to 3
 */
export function pitchOf(code, octave) {
  const lower = LOWER.indexOf(code), upper = UPPER.indexOf(code);
  const pitch = lower >= 0 ? 48 + lower : upper >= 0 ? 60 + upper : NaN;
  return pitch + 12 * octave >= LOWEST && pitch + 12 * octave <= HIGHEST ? pitch + 12 * octave : undefined;
}

/** @param {number} pitch */
const isWhite = (pitch) => !BLACK.has(pitch % 12);

/**
 * The keys that fit: white and black ones with their places, in widths of a white key.
 * @param {number} width @param {number} least of a white key @param {number} octave
 */
export function layout(width, least, octave) {
  const all = Array.from({ length: HIGHEST - LOWEST + 1 }, (_, n) => LOWEST + n);
  const whites = all.filter(isWhite), fit = Math.max(8, Math.min(whites.length, Math.floor(width / least)));
  const middle = whites.indexOf(60 + 12 * octave) + 3; // F of the octave of middle C
  const first = Math.max(0, Math.min((middle < 3 ? 3 : middle) - Math.floor(fit / 2), whites.length - fit));
  const [low, high] = [whites[first], whites[first + fit - 1]];
  const keys = all.filter((pitch) => pitch >= low && pitch <= high).map((pitch) => {
    const place = whites.filter((white) => white >= low && white < pitch).length;
    return isWhite(pitch) ? { pitch, left: place, right: place + 1, white: true }
      : { pitch, left: place - 0.3, right: place + 0.3, white: false };
  });
  return { keys, whites: fit };
}

export class Keys {
  octave = 0;
  /** @type {Map<number, number>} the pitch that each finger, or the mouse, holds down */
  #fingers = new Map();
  /** @type {Map<string, number>} the pitch that each key of the computer holds down */
  #codes = new Map();
  #touched = matchMedia('(pointer: coarse)').matches;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {Instrument} instrument
   * @param {() => void} changed
   */
  constructor(canvas, instrument, changed) {
    this.canvas = canvas;
    this.instrument = instrument;
    this.changed = changed;
    this.#listenToPointers();
    canvas.addEventListener('keydown', (event) => this.#keyDown(event));
    // Wherever the focus is by then: a key must not get stuck.
    document.addEventListener('keyup', (event) => this.#keyUp(event), true);
    const release = () => this.releaseAll();
    canvas.addEventListener('blur', release);
    window.addEventListener('blur', release);
  }

  /** @param {number} by */
  shift(by) {
    this.releaseAll();
    this.octave = Math.max(-3, Math.min(this.octave + by, 3));
    this.changed();
  }

  /** Where the two rows of the computer's keys begin, in words. */
  get place() { return `The lower row of keys begins at C${3 + this.octave}, the upper one at C${4 + this.octave}.`; }

  releaseAll() {
    const now = performance.now();
    for (const pitch of [...this.#codes.values(), ...this.#fingers.values()]) this.instrument.up(pitch, now);
    if (this.#codes.size || this.#space) this.instrument.pedal(false, now);
    this.#space = false;
    this.#codes.clear();
    this.#fingers.clear();
  }

  #space = false;

  #layout() {
    return layout(this.canvas.clientWidth, this.#touched ? LEAST_TOUCHED_PX : LEAST_KEY_PX, this.octave);
  }

  /** @param {Map<number, boolean>} lit pitches that sound, and whether hands play them @param {{generated: string, sounding: string, shade: string}} ink */
  draw(lit, ink) {
    const { pen, width, height } = prepare(this.canvas);
    if (!width) return;
    const { keys, whites } = this.#layout(), wide = width / whites;
    for (const white of [true, false]) {
      for (const key of keys.filter((each) => each.white === white)) {
        const [left, right] = [key.left * wide, key.right * wide], hands = lit.get(key.pitch);
        const color = hands === undefined ? null : hands ? ink.sounding : ink.generated;
        pen.fillStyle = color ?? (white ? '#fbfbfa' : '#22252b');
        pen.fillRect(left, 0, right - left, white ? height : 0.62 * height);
        pen.strokeStyle = '#8a909c';
        pen.lineWidth = 1;
        pen.strokeRect(left + 0.5, -1, right - left - 1, (white ? height : 0.62 * height) + 0.5);
        if (white && key.pitch % 12 === 0 && wide > 11) {
          pen.fillStyle = color ? ink.shade : '#5b6270';
          pen.font = '10px system-ui, sans-serif';
          pen.textAlign = 'center';
          pen.fillText(`C${key.pitch / 12 - 1}`, (left + right) / 2, height - 5);
        }
      }
    }
  }

  /** @param {PointerEvent} event */
  #hit(event) {
    const box = this.canvas.getBoundingClientRect(), { keys, whites } = this.#layout();
    const x = ((event.clientX - box.left) / box.width) * whites, y = (event.clientY - box.top) / box.height;
    const under = keys.filter((key) => key.left <= x && x < key.right && (key.white || y < 0.62));
    const key = under.find((each) => !each.white) ?? under[0];
    if (!key) return null;
    const depth = Math.max(0, Math.min(y / (key.white ? 1 : 0.62), 1)); // a key is louder the nearer its front edge
    return { pitch: key.pitch, velocity: Math.round(40 + 65 * depth) };
  }

  #listenToPointers() {
    this.canvas.addEventListener('pointerdown', (event) => {
      if (event.button) return;
      this.#touched = event.pointerType === 'touch' || this.#touched;
      try { this.canvas.setPointerCapture(event.pointerId); } catch { /* the finger is up already */ }
      this.#slide(event);
    });
    this.canvas.addEventListener('pointermove', (event) => { if (this.#fingers.has(event.pointerId)) this.#slide(event); });
    this.canvas.addEventListener('contextmenu', (event) => { if (this.#fingers.size) event.preventDefault(); }); // a finger that rests
    for (const end of ['pointerup', 'pointercancel'])
      this.canvas.addEventListener(end, (event) => this.#lift(/** @type {PointerEvent} */ (event)));
  }

  /** @param {PointerEvent} event */
  #slide(event) {
    const hit = this.#hit(event), before = this.#fingers.get(event.pointerId);
    if (!hit || hit.pitch === before) return;
    if (before !== undefined) this.instrument.up(before, event.timeStamp);
    this.#fingers.set(event.pointerId, hit.pitch);
    this.instrument.down(hit.pitch, hit.velocity, event.timeStamp);
  }

  /** @param {PointerEvent} event */
  #lift(event) {
    const pitch = this.#fingers.get(event.pointerId);
    this.#fingers.delete(event.pointerId);
    if (pitch !== undefined) this.instrument.up(pitch, event.timeStamp);
  }

  /** @param {KeyboardEvent} event */
  #keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const pitch = pitchOf(event.code, this.octave), shift = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (pitch === undefined && event.key !== ' ' && !shift) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.repeat) return;
    if (shift) this.shift(shift);
    else if (event.key === ' ') { this.#space = true; this.instrument.pedal(true, event.timeStamp); }
    else if (pitch !== undefined) {
      this.#codes.set(event.code, pitch);
      this.instrument.down(pitch, event.shiftKey ? 105 : 76, event.timeStamp);
    }
  }

  /** @param {KeyboardEvent} event */
  #keyUp(event) {
    if (event.key === ' ' && this.#space) { this.#space = false; this.instrument.pedal(false, event.timeStamp); }
    const pitch = this.#codes.get(event.code);
    this.#codes.delete(event.code);
    if (pitch !== undefined) this.instrument.up(pitch, event.timeStamp);
  }
}
