// Keeps what is played. Nothing here touches the page. Times that come in are in ms, by the clock of events.

import { sustained } from './notes.js';

/** @typedef {import('./notes.js').Note} Note */

export const MOST_NOTES = 20_000; // as many as one message to the server can hold
const EARLY_MS = 300; // a first note that comes a little before the end of a count-in

export class Recorder {
  /** @type {Note[]} with the lengths of the keys, without the pedal */
  keys = [];
  /** @type {[number, number][]} */
  pedals = [];
  /** @type {number | null} time of the beginning; null before the first note */
  #began = null;
  /** @type {Map<number, Note>} */
  #down = new Map();
  /** @type {number | null} since when the pedal is down, in ms */
  #pedalSince = null;
  recording = false;

  /**
   * Begin anew.
   * @param {number | null} at when the music begins, in ms; null: with its first note
   */
  start(at = null) {
    Object.assign(this, { keys: [], pedals: [], recording: true });
    this.#began = at;
    this.#down.clear();
    if (this.#pedalSince !== null && at !== null) this.#pedalSince = at;
  }

  /** Whether no more notes are kept. */
  get full() { return this.keys.length >= MOST_NOTES; }

  /** @param {number} pitch @param {number} velocity @param {number} at */
  down(pitch, velocity, at) {
    if (!this.recording || this.full) return;
    this.#began ??= at;
    if (at < this.#began - EARLY_MS) return; // played to the count-in
    at = Math.max(at, this.#began);
    this.up(pitch, at); // some devices strike twice without a release between
    const on = this.#seconds(at), note = { on, off: on + 0.001, pitch, velocity, held: true };
    this.#down.set(pitch, note);
    this.keys.push(note);
  }

  /** @param {number} pitch @param {number} at */
  up(pitch, at) {
    const note = this.#down.get(pitch);
    if (!note) return;
    this.#down.delete(pitch);
    note.off = Math.max(note.on + 0.001, this.#seconds(at));
    delete note.held;
  }

  /** @param {boolean} down @param {number} at */
  pedal(down, at) {
    if (down) { this.#pedalSince ??= at; return; }
    if (this.#pedalSince === null) return;
    if (this.recording && this.#began !== null && at > this.#began)
      this.pedals.push([this.#seconds(Math.max(this.#pedalSince, this.#began)), this.#seconds(at)]);
    this.#pedalSince = null;
  }

  /** How long the recording is at a time, in seconds. @param {number} at */
  length(at) { return this.#began === null ? 0 : Math.max(0, this.#seconds(at)); }

  /** The notes as they sound at a time, with the pedal. @param {number} at @returns {Note[]} */
  notes(at) {
    const now = this.length(at);
    const keys = this.keys.map((note) => (note.held ? { ...note, off: Math.max(note.off, now) } : note));
    return sustained(keys, this.#pedalsUntil(at));
  }

  /** @param {number} at @returns {[number, number][]} */
  #pedalsUntil(at) {
    if (this.#pedalSince === null || this.#began === null) return this.pedals;
    return [...this.pedals, [this.#seconds(Math.max(this.#pedalSince, this.#began)), this.#seconds(at)]];
  }

  /**
   * End the recording; keys and pedal that are still down end now.
   * @param {number} at
   */
  stop(at) {
    for (const pitch of [...this.#down.keys()]) this.up(pitch, at);
    if (this.recording) this.pedals = this.#pedalsUntil(at);
    this.recording = false;
    return { keys: this.keys, pedals: this.pedals, notes: sustained(this.keys, this.pedals) };
  }

  /** @param {number} at */
  #seconds(at) { return Math.round(at - (this.#began ?? at)) / 1000; }
}
