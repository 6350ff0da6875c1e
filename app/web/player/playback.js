// Plays a score that may still be growing, in a loop if asked, at any tempo.

import { Score } from './notes.js';

/** @typedef {import('./notes.js').Note} Note */
/** @typedef {import('./piano.js').Piano} Piano */
/** @typedef {import('./piano.js').Voice} Voice */
/** @typedef {{from: number, to: number}} Region */

const MUSIC_AHEAD_S = 1.5; // that must be there before a growing piece begins to play
const REST_S = 0.3; // after the end of a piece, for its last notes to ring

export class Playback {
  score = new Score([]);
  /** Length of the music known so far. */
  until = 0;
  /** Whether more music is on its way. */
  growing = false;
  /** Where playback ends before the end of the music. */
  stopAt = Infinity;
  /** @type {Region | null} repeated while it is set */
  loop = null;
  /** In semitones. */
  transpose = 0;
  playing = false;
  /** Whether playback waits for more music. */
  waiting = false;

  #tempo = 1;
  #position = 0;
  #next = 0; // index of the next note to schedule
  /** @type {{at: number, from: number}[]} when, by the clock of the sound, which position plays; later ones are loops to come */
  #anchors = [];
  /** @type {Map<string, Voice | null>} voices of notes whose end is not known yet */
  #open = new Map();
  /** @type {{voice: Voice, until: number}[]} voices with a scheduled end, which a pause must bring forward */
  #ringing = [];

  /** @param {Piano} piano */
  constructor(piano) { this.piano = piano; }

  /** Where the music is, in seconds. */
  get position() {
    const now = this.piano.now, anchor = this.#anchors.findLast(({ at }) => at <= now);
    return this.playing && anchor ? anchor.from + (now - anchor.at) * this.#tempo : this.#position;
  }

  /** Whether there is sound, and not only the wish for it. */
  get sounding() { return this.playing && this.#anchors.length > 0; }

  get tempo() { return this.#tempo; }
  set tempo(factor) {
    const { now } = this.piano, later = (/** @type {number} */ at) => now + (at - now) * (this.#tempo / factor);
    const ahead = this.#anchors.filter(({ at }) => at > now).map(({ at, from }) => ({ at: later(at), from }));
    if (this.#anchors.length) this.#anchors = [{ at: now, from: this.position }, ...ahead];
    for (const each of this.#ringing) if (each.until > now) this.piano.release(each.voice, each.until = later(each.until));
    this.#tempo = factor;
  }

  /** Where the music ends. */
  get end() { return Math.min(this.until, this.stopAt); }

  /** More, or other notes of the same music. @param {Score} score @param {number} until @param {boolean} growing */
  update(score, until, growing) {
    Object.assign(this, { score, until, growing });
    if (!this.playing) this.#position = Math.min(this.#position, until);
    if (!this.sounding) return;
    this.#next = Math.max(this.#next, 0);
    for (const note of score.notes) if (!note.held) this.#releaseAtEnd(note);
  }

  play() {
    if (this.playing || !this.score.notes.length) return;
    this.piano.ready();
    const outside = this.loop && !(this.#position >= this.loop.from && this.#position < this.loop.to);
    if (this.loop && outside) this.#position = this.loop.from;
    else if (!this.growing && this.#position >= this.end - 0.05) this.#position = 0;
    this.playing = true;
    this.#anchors = [];
    this.tick();
  }

  pause() {
    this.#position = this.position;
    this.playing = this.waiting = false;
    this.#anchors = [];
    const now = this.piano.now;
    for (const voice of this.#open.values()) if (voice) this.piano.release(voice, now, 0.03);
    for (const { voice } of this.#ringing) this.piano.release(voice, now, 0.03);
    this.#open.clear();
    this.#ringing = [];
  }

  /** @param {number} seconds */
  seek(seconds) {
    const was = this.playing;
    if (was) this.pause();
    this.#position = Math.max(0, Math.min(seconds, this.until));
    if (was) this.play();
  }

  /** Schedule what sounds next. Call this several times a second. */
  tick() {
    if (!this.playing) return;
    if (!this.#anchors.length && !this.#start()) return;
    const now = this.piano.now, position = this.position, end = this.end;
    this.#ringing = this.#ringing.filter(({ until }) => until > now);
    if (!this.loop && position >= end) return this.#endReached(position, end);
    const ahead = document.hidden ? 1.6 : 0.25; // seconds; browsers run the timers of hidden pages once a second
    this.#schedule(now + ahead);
    this.#anchors = this.#anchors.filter((anchor, index, all) => index === all.length - 1 || all[index + 1].at > now);
  }

  #start() {
    const enough = !this.growing || this.until - this.#position > MUSIC_AHEAD_S;
    this.waiting = !enough;
    if (!enough || !this.piano.loaded) return false;
    this.#begin({ at: this.piano.now + 0.06, from: this.#position });
    return true;
  }

  /** @param {{at: number, from: number}} anchor */
  #begin(anchor) {
    this.#anchors.push(anchor);
    this.#next = this.score.firstFrom(anchor.from - 0.005);
  }

  /** @param {number} position @param {number} end */
  #endReached(position, end) {
    if (this.growing && end === this.until) {
      this.#position = end;
      this.#anchors = [];
      this.waiting = true;
    } else if (position >= end + REST_S) {
      this.pause();
      this.#position = end;
    }
  }

  /** Schedule all notes up to a time by the clock of the sound, round the loop if need be. @param {number} horizon */
  #schedule(horizon) {
    const { notes } = this.score;
    for (let turns = 0; turns < 20; turns++) { // a loop shorter than the time ahead goes round several times
      const anchor = this.#anchors[this.#anchors.length - 1];
      const reached = anchor.from + (horizon - anchor.at) * this.#tempo;
      const stop = Math.min(this.end, this.loop?.to ?? Infinity);
      for (; this.#next < notes.length && notes[this.#next].on < Math.min(reached, stop); this.#next++)
        this.#strike(notes[this.#next]);
      if (!this.loop || reached < stop || this.loop.to - this.loop.from < 0.05) return;
      this.#releaseOpen(this.#when(stop));
      this.#begin({ at: anchor.at + (stop - anchor.from) / this.#tempo, from: this.loop.from });
    }
  }

  /** @param {Note} note */
  #strike(note) {
    const voice = this.piano.strike(this.#sounds(note.pitch), note.velocity, Math.max(0, this.#when(note.on)));
    this.#open.set(key(note), voice);
    if (!note.held) this.#releaseAtEnd(note);
  }

  /** @param {number} pitch */
  #sounds(pitch) { return Math.max(21, Math.min(108, pitch + this.transpose)); }

  /** When a time of the music is heard, by the clock of the sound. @param {number} seconds */
  #when(seconds) {
    const anchor = this.#anchors[this.#anchors.length - 1];
    return anchor.at + (seconds - anchor.from) / this.#tempo;
  }

  /** End the notes whose own end is not known. @param {number} until by the clock of the sound */
  #releaseOpen(until) {
    for (const voice of this.#open.values()) if (voice) this.piano.release(voice, until);
    this.#open.clear();
  }

  /** @param {Note} note */
  #releaseAtEnd(note) {
    const voice = this.#open.get(key(note));
    if (!voice) return;
    this.#open.delete(key(note));
    const until = Math.max(this.piano.now, this.#when(Math.min(note.off, this.loop?.to ?? Infinity)));
    this.piano.release(voice, until);
    this.#ringing.push({ voice, until });
  }
}

/** @param {Note} note */
const key = (note) => `${note.on} ${note.pitch}`;
