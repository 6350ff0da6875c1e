// The instrument: sounds at once what hands play, whichever way they play it, and tells those who listen.

/** @typedef {import('./piano.js').Piano} Piano */
/** @typedef {import('./piano.js').Voice} Voice */
/**
 * @typedef {{
 *   down: (pitch: number, velocity: number, at: number) => void,
 *   up: (pitch: number, at: number) => void,
 *   pedal: (down: boolean, at: number) => void,
 * }} Listener `at` is in ms, by the clock of events
 */

const STUCK_MS = 60_000; // a key that is down for longer was not released by a hand

export class Instrument {
  /** @type {Map<number, {voice: Voice | null, at: number}>} keys that are down */
  held = new Map();
  /** @type {Map<number, Voice | null>} voices that the pedal sustains */
  #sustained = new Map();
  pedalDown = false;
  /** @type {Listener[]} */
  listeners = [];

  /** @param {Piano} piano */
  constructor(piano) { this.piano = piano; }

  /** @param {number} pitch @param {number} velocity from 1 to 127 @param {number} at */
  down(pitch, velocity, at) {
    if (!(pitch >= 21 && pitch <= 108)) return; // not on a piano
    if (this.held.has(pitch)) this.up(pitch, at);
    this.#fade(this.#sustained, pitch);
    this.held.set(pitch, { voice: this.piano.strike(pitch, velocity, 0), at });
    for (const listener of this.listeners) listener.down(pitch, velocity, at);
  }

  /** @param {number} pitch @param {number} at */
  up(pitch, at) {
    const key = this.held.get(pitch);
    if (!key) return;
    this.held.delete(pitch);
    if (this.pedalDown) this.#sustained.set(pitch, key.voice);
    else if (key.voice) this.piano.release(key.voice, this.piano.now);
    for (const listener of this.listeners) listener.up(pitch, at);
  }

  /** @param {boolean} down @param {number} at */
  pedal(down, at) {
    if (down === this.pedalDown) return;
    this.pedalDown = down;
    if (!down) for (const pitch of [...this.#sustained.keys()]) this.#fade(this.#sustained, pitch);
    for (const listener of this.listeners) listener.pedal(down, at);
  }

  /** Release everything: the device is gone, or the page is left. @param {number} at */
  release(at) {
    for (const pitch of [...this.held.keys()]) this.up(pitch, at);
    this.pedal(false, at);
  }

  /** Release the keys that no hand holds down any more; their number. @param {number} at */
  releaseStuck(at) {
    const stuck = [...this.held].filter(([, key]) => at - key.at > STUCK_MS).map(([pitch]) => pitch);
    for (const pitch of stuck) this.up(pitch, at);
    return stuck.length;
  }

  /** @param {Map<number, Voice | null>} voices @param {number} pitch */
  #fade(voices, pitch) {
    const voice = voices.get(pitch);
    voices.delete(pitch);
    if (voice) this.piano.release(voice, this.piano.now);
  }
}
