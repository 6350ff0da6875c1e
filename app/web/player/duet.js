// A duet: someone plays, pauses, and the model answers from there, until someone plays again.

import { Conversation, Pause } from '../conversation.js';
import { keepDuet, keptDuet, upTo } from './kept_duet.js';
import { pack, Score, sustained } from './notes.js';

/** @typedef {import('../conversation.js').Answered} Answered */
/** @typedef {import('./notes.js').Note} Note */
/** @typedef {import('./music.js').Music} Music */
/** @typedef {import('./player.js').Player} Player */
/** @typedef {import('./takes.js').Take} Take */

const LEAD_S = 0.15; // from the request to the first note of an answer
const LONGEST_ANSWER_S = 60;
const AHEAD_S = 0.12; // how early a note of an answer is scheduled, so that playing silences it at once
const KEEP_EVERY_MS = 2000;

/**
 * What was played or answered as notes; those that still sound end now. @param {Iterable<(string | number)[]>} events
 * @param {number} now in seconds @param {boolean} human @returns {{notes: Note[], pedals: [number, number][]}}
 */
export function notesOf(events, now, human) {
  /** @type {Map<number, Note>} */
  const down = new Map();
  /** @type {Note[]} */
  const notes = [];
  /** @type {[number, number][]} */
  const pedals = [];
  let pedalSince = -1;
  for (const event of events) {
    const [time, kind, pitch, velocity] = /** @type {[number, string, number, number]} */ (event), note = down.get(pitch);
    if (kind === 'pedal') {
      if (pitch >= 64 && pedalSince < 0) pedalSince = time;
      if (pitch < 64 && pedalSince >= 0) { pedals.push([pedalSince, time]); pedalSince = -1; }
    } else if (kind !== 'release') {
      if (note) { note.off = Math.max(time, note.on + 0.001); down.delete(pitch); }
      if (kind === 'on') {
        const struck = { on: time, off: time, pitch, velocity, human };
        down.set(pitch, struck);
        notes.push(struck);
      }
    }
  }
  for (const note of down.values()) note.off = Math.max(now, note.on + 0.001);
  if (pedalSince >= 0 && now > pedalSince) pedals.push([pedalSince, now]);
  return { notes: sustained(notes, pedals), pedals };
}

/** The stretches that a human played, for a take. @param {Note[]} notes sorted @returns {{from: number, to: number}[]} */
export function turnsOf(notes) {
  /** @type {{from: number, to: number}[]} */
  const turns = [];
  let open = false;
  for (const note of notes) {
    if (note.human && !open) turns.push({ from: note.on, to: note.off });
    else if (!note.human && open) turns[turns.length - 1].to = note.on;
    open = Boolean(note.human);
  }
  if (open) turns[turns.length - 1].to = Infinity;
  return turns;
}

export class Duet {
  /** @type {Conversation | null} */
  #conversation = null;
  /** @type {Pause | null} */
  #pause = null;
  #began = 0; // when the conversation was at 0 s, in ms by the clock of events
  /** @type {Answered[]} events of the answer that are still to be heard */
  #coming = [];
  /** @type {Map<number, import('./piano.js').Voice | null>} by pitch */
  sounding = new Map();
  /** @type {Record<string, number>} settings of the page; without any, the server's defaults count */
  settings = {};
  #id = '';
  #kept = 0;

  /** @param {Player} player */
  constructor(player) {
    this.player = player;
    player.instrument.listeners.push({
      down: (pitch, velocity, at) => this.#play([this.#seconds(at), 'on', pitch, velocity]),
      up: (pitch, at) => this.#play([this.#seconds(at), 'off', pitch]),
      pedal: (down, at) => this.#play([this.#seconds(at), 'pedal', down ? 127 : 0]),
    });
    setInterval(() => this.#tick(), 20);
    window.addEventListener('pagehide', () => { this.#silence(); this.#conversation?.silence(this.#seconds(performance.now())); this.#keep(); });
  }

  get active() { return this.#conversation !== null; }

  /** Seconds from the start of the conversation. @param {number} at in ms */
  #seconds(at) { return (at - this.#began) / 1000; }

  /** What the conversation is at now, for the timeline. @returns {{score: Score, pedals: [number, number][], until: number}} */
  get picture() {
    const now = this.#seconds(performance.now()), timeline = this.#conversation?.timeline;
    if (!timeline) return { score: new Score([]), pedals: [], until: 0 };
    const played = notesOf(timeline.played, now, true), answered = notesOf(timeline.answered.filter(([time]) => time <= now), now, false);
    const before = timeline.notes.map(([on, off, pitch, velocity]) => ({ on, off, pitch, velocity }));
    const notes = [...before, ...played.notes, ...answered.notes].sort((a, b) => a.on - b.on);
    return { score: new Score(notes), pedals: played.pedals, until: now };
  }

  /** Begin at the end of what is on the timeline. @param {Music} music @param {number} pauseS */
  start(music, pauseS) {
    const notes = music.score.notes.map(({ on, off, pitch, velocity }) => /** @type {[number, number, number, number]} */ ([on, off, pitch, velocity]));
    const id = `duet-${crypto.getRandomValues(new Uint32Array(2)).join('-')}`;
    this.#open({ id, pauseS, until: music.until, latents: this.settings.latents ?? 0, timeline: { notes, played: [], answered: [] } });
  }

  /** Go on with a duet that a reload has interrupted. @returns {boolean} whether there was one */
  resume() {
    const kept = keptDuet();
    if (kept) this.#open(kept);
    return kept !== null;
  }

  /** @param {import('./kept_duet.js').KeptDuet} duet */
  #open({ id, pauseS, until, latents, timeline }) {
    this.#began = performance.now() - 1000 * until;
    this.#id = id;
    const conversation = (this.#conversation = new Conversation(document.baseURI, { timeline, latents }));
    this.#pause = new Pause(() => this.#ask(), pauseS);
    const listen = (/** @type {string} */ name, /** @type {(detail: any) => void} */ act) =>
      conversation.addEventListener(name, (event) => { if (conversation === this.#conversation) act(/** @type {CustomEvent} */ (event).detail); });
    listen('ready', ({ resumed }) => this.#greet(resumed));
    listen('connection', ({ message }) => { if (message) this.player.tell(message); });
    listen('problem', ({ message }) => this.player.tell(message));
    listen('answering', ({ others }) => this.player.tell(others ? `It answers, and shares the machine with ${others} others.` : 'It answers. Play, and it falls silent.'));
    listen('music', ({ events }) => { this.#coming.push(...events); this.#tick(); });
    listen('end', ({ at, why }) => this.#ended(at, why));
    this.player.tell('Connecting …');
    conversation.connect();
  }

  /** @param {boolean} resumed whether the server still had the duet */
  #greet(resumed) {
    if (!this.#conversation?.timeline.played.length) this.player.tell('Play. When you pause, the model answers.');
    else if (resumed) this.player.tell('The duet goes on. Play; when you pause, the model answers.');
    else this.player.tell('The server no longer had the duet. It reads it again, and the duet goes on: play.');
  }

  /** Seconds after the last key until the model answers. */
  get pauseS() { return this.#pause?.seconds ?? 0.8; }

  /** @param {number} seconds after the last key, until the model answers */
  setPause(seconds) { if (this.#pause) this.#pause.seconds = Math.max(0.2, Math.min(seconds, 10)); }

  /** End the duet; what was played and heard becomes a take. @returns {Take | null} */
  stop() {
    const take = this.#keep();
    this.#pause?.stop();
    this.#silence();
    this.#conversation?.close();
    if (this.#conversation) { this.#conversation.forget(); keepDuet(null); }
    this.#conversation = this.#pause = null;
    return take;
  }

  /** @param {import('../conversation.js').Played} event */
  #play(event) {
    if (!this.#conversation) return;
    if (event[1] === 'on') this.#silence();
    this.#conversation.play([event]);
    this.#pause?.play([event]);
    this.player.face.touch();
  }

  #ask() {
    const { latents: _, ...sampling } = this.settings;
    this.#conversation?.answer(this.#seconds(performance.now()), { ...sampling, lead: LEAD_S, seconds: LONGEST_ANSWER_S });
  }

  /** Make the notes heard whose time has come. */
  #tick() {
    if (!this.#conversation) return;
    const now = this.#seconds(performance.now()), { piano } = this.player;
    const until = now + (document.hidden ? 1.2 : AHEAD_S); // browsers run the timers of hidden pages once a second
    while (this.#coming.length && this.#coming[0][0] <= until) {
      const [time, kind, pitch, velocity] = /** @type {[number, string, number, number]} */ (this.#coming.shift());
      const when = piano.now + Math.max(0, time - now), before = this.sounding.get(pitch);
      if (kind === 'release') continue;
      if (before) piano.release(before, when);
      this.sounding.delete(pitch);
      if (kind === 'on') this.sounding.set(pitch, piano.strike(pitch, velocity, when));
    }
    if (performance.now() - this.#kept > KEEP_EVERY_MS) this.#keep();
  }

  /** @param {number} at @param {string} why */
  #ended(at, why) {
    if (why === 'silenced' || why === 'lost') this.#silence();
    if (why === 'failed') this.player.tell('The model could not answer. Play on, and it tries again.');
    else if (why !== 'silenced' && why !== 'lost') this.#coming.push(...[...this.sounding.keys()].map((pitch) => /** @type {Answered} */ ([at, 'off', pitch])));
  }

  #silence() {
    const { piano } = this.player;
    this.#coming = [];
    for (const voice of this.sounding.values()) if (voice) piano.release(voice, piano.now, 0.02);
    this.sounding.clear();
  }

  /** @param {Conversation} conversation @param {number} until */
  #keepOpen({ timeline, latents }, until) {
    keepDuet({ id: this.#id, until, pauseS: this.pauseS, latents, timeline: upTo(timeline, until) });
  }

  /** Keep the duet so far in the browser, as a take and to go on with. @returns {Take | null} */
  #keep() {
    this.#kept = performance.now();
    if (!this.#conversation) return null;
    const { score, pedals } = this.picture, { takes } = this.player.shelf, known = takes.all.get(this.#id);
    if (!score.notes.some((note) => note.human)) return null;
    this.#keepOpen(this.#conversation, this.#seconds(this.#kept));
    const first = score.notes[0].on; // a duet begins with its first note
    for (const note of score.notes) { note.on -= first; note.off -= first; }
    const take = {
      id: this.#id, kind: /** @type {const} */ ('duet'), made: known?.made ?? Date.now(), notes: pack(score.notes),
      pedals: pedals.map(([from, to]) => /** @type {[number, number]} */ ([from - first, to - first])), join: score.end - first, until: score.end - first, seed: null, latents: 0, settings: '', starred: known?.starred ?? false, turns: turnsOf(score.notes),
    };
    takes.keep(take);
    return take;
  }
}
