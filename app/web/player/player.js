// The timeline and the instrument of the page, put together.

import { connect } from './controls.js';
import { Duet } from './duet.js';
import { Face } from './face.js';
import { LEAST_REGION_S } from './gestures.js';
import { Instrument } from './instrument.js';
import { Keys } from './keys.js';
import { compressed } from './midi.js';
import { NOTHING, received, stored } from './music.js';
import { clock } from './notes.js';
import { Piano } from './piano.js';
import { Playback } from './playback.js';
import { Recording } from './recording.js';
import { fileOf, Shelf } from './shelf.js';
import { Viewport } from './viewport.js';

/** @typedef {import('./music.js').Music} Music */
/** @typedef {import('./music.js').Value} Value */
/** @typedef {import('./takes.js').Take} Take */
/** @typedef {import('./playback.js').Region} Region */

const PROMPT_LEAD_S = 4; // playback of a new piece starts this long before the end of its prompt …
const LEAD_S = 2; // … and that of an extension this long before the old end

export class Player {
  /** @type {Value | null} what Python sent last of a piece */
  piece = null;
  /** @type {Music[]} its variations */
  variations = [];
  /** @type {Value | null} what Python sent last of a prompt */
  #part = null;
  /** @type {Music} */
  prompt = NOTHING;
  /** @type {{name: string, take: Take} | null} what was sent to be the prompt */
  #played = null;
  /** @type {Music} what is on the timeline */
  shown = NOTHING;
  /** @type {Region | null} the selected part */
  region = null;
  loops = false;
  viewport = new Viewport();
  #startWithNotes = false; // playback starts as soon as there are notes
  #telling = 0;

  /** @param {HTMLElement} root @param {(name: string, data: object) => void} trigger an event that Python hears of @param {import('./language.js').Language} language */
  constructor(root, trigger, language) {
    this.root = root;
    this.trigger = trigger;
    this.piano = new Piano(root.dataset.samples ?? '');
    this.playback = new Playback(this.piano);
    this.instrument = new Instrument(this.piano);
    this.face = new Face(this);
    this.keys = new Keys(this.canvas('keys'), this.instrument, () => this.face.touch());
    this.recording = new Recording(this.instrument, {
      tell: (message) => this.tell(message), changed: () => this.face.touch(), done: (take) => this.#recorded(take),
    });
    this.shelf = new Shelf(this);
    this.duet = new Duet(this);
    this.language = language;
    language.listeners.push(() => this.face.touch());
    connect(this);
    setInterval(() => this.playback.tick(), 40);
    setInterval(() => this.#releaseStuck(), 5000);
  }

  /** @param {string} name @returns {HTMLElement} */
  find(name) { return /** @type {HTMLElement} */ (this.root.querySelector(`.${name}`)); }
  /** @param {string} name */
  button(name) { return /** @type {HTMLButtonElement} */ (this.find(name)); }
  /** @param {string} name */
  canvas(name) { return /** @type {HTMLCanvasElement} */ (this.find(name)); }
  /** @param {string} name */
  input(name) { return /** @type {HTMLInputElement} */ (this.find(name)); }
  /** @returns {HTMLElement[]} */
  edges() { return [...this.root.querySelectorAll('.edge')].map((each) => /** @type {HTMLElement} */ (each)); }

  get generating() { return Boolean(this.piece?.generating); }

  /** Say something next to the piano. @param {string} message */
  tell(message) { this.find('say').textContent = message; }

  // ---------------------------------------------------------------- music from Python

  /** @param {Value} value */
  receive(value) {
    if (!value || typeof value !== 'object') return;
    this.face.message = value.message;
    if (value.kind === 'prompt') this.#receivePrompt(value); else this.#receivePiece(value);
    this.shelf.show();
    this.face.touch();
  }

  /** @param {Value} value */
  #receivePrompt(value) {
    const before = this.#part, same = before?.piece === value.piece;
    if (same && before.start === value.start && before.end === value.end) return; // a field was left as it was
    this.#part = value;
    this.prompt = value.variations.length ? received(value, 0, undefined) : { ...NOTHING, id: 'prompt', kind: 'prompt' };
    if (value.name && value.name === this.#played?.name) Object.assign(this.prompt, { id: this.#played.take.id, pedals: this.#played.take.pedals });
    if (same && this.shown.kind === 'prompt') this.shown = this.prompt; else this.show(this.prompt);
    this.#setRegion(this.#partOfPrompt());
  }

  #partOfPrompt() { return this.#part?.variations.length ? { from: this.#part.start, to: this.#part.end } : null; }

  /** @param {Value} value */
  #receivePiece(value) {
    const before = this.piece, fresh = before?.piece !== value.piece, old = fresh ? [] : this.variations;
    const was = this.variations.findIndex((each) => each.id === this.shown.id), same = old.length === value.variations.length;
    this.piece = value;
    this.variations = value.variations.map((_, number) => received(value, number, same ? old[number] : undefined));
    if (!this.variations.length) return;
    const begins = value.autoplay && (fresh || !before?.generating);
    // Within a piece the choice made here counts: the server may have sent this before it heard of it.
    const chosen = this.variations[same && was >= 0 ? was : value.chosen] ?? this.variations[0];
    if (fresh || begins || was >= 0 || this.shown.id === '') this.#follow(chosen, value, fresh, begins);
    if (!value.generating) this.shelf.keep(this.variations, value);
  }

  /** Show a piece as it grows, and play it when it begins. @param {Music} music @param {Value} value @param {boolean} fresh @param {boolean} begins */
  #follow(music, value, fresh, begins) {
    if (fresh || music.kind !== this.shown.kind) this.show(music);
    else {
      this.shown = music;
      this.face.roll.forget(music.changedFrom);
      this.viewport.resize(music.until);
      this.playback.update(music.score, music.until, music.growing);
    }
    if (begins) {
      this.#startWithNotes = this.viewport.follows = true;
      const lead = value.begins === value.join ? PROMPT_LEAD_S : LEAD_S;
      if (!this.playback.playing) this.playback.seek(Math.max(0, value.begins - lead));
    }
    if (this.#startWithNotes && music.score.notes.length) { this.#startWithNotes = false; this.playback.play(); }
  }

  /** Put music on the timeline. @param {Music} music @param {number} [at] where to play */
  show(music, at = 0) {
    this.playback.pause();
    this.duet.stop();
    this.#startWithNotes = false;
    this.shown = music;
    this.#setRegion(null);
    this.face.roll.forget(0);
    this.viewport.follows = true;
    this.viewport.resize(music.until);
    this.viewport.showAll();
    this.playback.update(music.score, music.until, music.growing);
    this.playback.seek(at);
    this.face.touch();
  }

  // ---------------------------------------------------------------- takes

  /** Show another take at the same position, and tell the server. @param {string} id */
  choose(id) {
    const take = this.shelf.takes.all.get(id), made = this.variations.find((music) => music.id === id);
    const music = id === this.prompt.id ? this.prompt : made ?? (take && stored(take));
    if (!music || music.id === this.shown.id) return;
    const at = Math.min(this.playback.position, music.until), was = this.playback.playing;
    const { viewport, region, loops } = this, { from, span, fits } = viewport;
    this.show(music, at);
    if (!fits) { viewport.fits = false; viewport.place(from, span); }
    if (id === this.prompt.id) this.#setRegion(this.#partOfPrompt());
    else if (region && region.to <= music.until) { this.#setRegion(region); this.setLoop(loops); }
    if (was) this.playback.play();
    this.shelf.show();
    this.#tellChoice(id, take);
  }

  /** @param {string} id @param {Take | undefined} take */
  async #tellChoice(id, take) {
    if (take?.kind === 'played') return this.#asPrompt(take);
    const variation = this.variations.findIndex((music) => music.id === id);
    if (variation >= 0) this.trigger('choose', { variation, take: id, at: performance.now() });
    else if (take && !this.generating) this.trigger('adopt', await this.shelf.sent(take));
  }

  /** Use what was played as the prompt. @param {Take} take */
  async #asPrompt(take) {
    const name = `Played at ${new Date(take.made).toLocaleTimeString('en-GB')}`;
    this.#played = { name, take };
    this.trigger('played', { name, midi: await compressed(fileOf(take)) });
  }

  // ---------------------------------------------------------------- what is played

  record() {
    const { recording } = this;
    if (recording.active) return recording.stop(performance.now());
    this.playback.pause();
    this.viewport.follows = true;
    recording.start(this.input('count-in').checked);
    this.canvas('keys').focus();
  }

  /** Begin a duet after what is on the timeline, or end it. */
  playDuet() {
    if (this.duet.active) {
      const take = this.duet.stop();
      this.tell(take ? 'The duet is a take now: play it, continue it, or take it out.' : '');
      if (take) this.choose(take.id);
      return;
    }
    this.playback.pause();
    this.viewport.follows = true;
    this.duet.start(this.shown, Number(this.input('pause-s').value) || 0.8);
    this.canvas('keys').focus();
  }

  /** Go on with a duet that a reload has interrupted, unless something else is on the timeline already. @returns {boolean} */
  resumeDuet() {
    if (this.shown.id !== '' || !this.duet.resume()) return false;
    this.input('pause-s').value = String(this.duet.pauseS);
    this.viewport.follows = true;
    this.face.touch();
    return true;
  }

  /** @param {Take} take */
  #recorded(take) {
    this.shelf.takes.keep(take);
    this.tell(`Recorded ${clock(take.until)}. Press Generate to hear it continued.`);
    this.choose(take.id);
    this.button('discard').hidden = this.button('again').hidden = false;
  }

  /** Drop the newest recording, and return to the one before it. */
  discard() {
    const [last, previous] = this.shelf.takes.list().filter((take) => take.kind === 'played');
    if (!last) return;
    this.shelf.remove(last.id);
    this.button('discard').hidden = this.button('again').hidden = !previous;
    if (previous) this.choose(previous.id);
    else { this.show({ ...NOTHING, id: 'none' }); this.trigger('played', { name: '', midi: '' }); }
    this.tell('The recording is undone.');
  }

  #releaseStuck() {
    if (this.instrument.releaseStuck(performance.now())) this.tell('A key was down for a minute: it was released.');
  }

  // ---------------------------------------------------------------- playing

  toggle() {
    if (this.recording.active) return this.recording.stop(performance.now());
    if (this.duet.active) return;
    if (this.playback.playing) this.playback.pause();
    else { this.viewport.follows = true; this.playback.play(); }
    this.face.touch();
  }

  /** @param {number} seconds */
  seek(seconds) {
    this.playback.seek(seconds);
    this.face.touch();
  }

  /** @param {Region | null} region */
  #setRegion(region) {
    this.region = region;
    const isPart = this.shown.kind === 'prompt';
    this.playback.stopAt = region && isPart ? region.to : Infinity;
    if (!region || isPart) this.setLoop(false);
    else if (this.loops) this.playback.loop = region;
    this.button('loop').disabled = !region || isPart;
    this.face.touch();
  }

  /** @param {boolean} loops */
  setLoop(loops) {
    this.loops = loops && this.region !== null;
    this.playback.loop = this.loops ? this.region : null;
    this.button('loop').setAttribute('aria-pressed', String(this.loops));
    if (this.loops && this.region && this.playback.playing) this.seek(this.region.from);
  }

  /** Select a region: in a prompt, the part to continue from. @param {number} from @param {number} to @param {boolean} done */
  select(from, to, done) {
    [from, to] = [Math.round(10 * from) / 10, Math.round(10 * to) / 10];
    const isPart = this.shown.kind === 'prompt';
    if (to - from < LEAST_REGION_S) { if (done && !isPart) this.#setRegion(null); return; }
    this.#setRegion({ from, to });
    if (!done || !isPart || !this.#part) return;
    this.#part = { ...this.#part, start: from, end: to };
    this.seek(from);
    clearTimeout(this.#telling);
    this.#telling = window.setTimeout(() => this.trigger('crop', { start: from, end: to }), 150); // not for each step of a key
  }

  /** Cut at the playhead and let the model go on from there. */
  async continueHere() {
    const take = this.shelf.takes.all.get(this.shown.id), until = this.playback.position;
    this.playback.pause();
    if (this.shown.kind === 'prompt') {
      this.#setRegion({ from: Math.min(this.region?.from ?? 0, until - LEAST_REGION_S), to: until });
      this.trigger('begin', { start: this.region?.from, end: until });
    } else if (take) this.trigger('go_on', { ...(await this.shelf.sent(take)), until });
  }

  /** Let the model go on at the end. */
  async extend() {
    const take = this.shelf.takes.all.get(this.shown.id);
    if (take) this.trigger('go_on', { ...(await this.shelf.sent(take)), until: null });
  }

  /** Make the selected region anew, joined to what is around it. */
  async fill() {
    const take = this.shelf.takes.all.get(this.shown.id), { region } = this;
    if (!take || !region) return;
    this.playback.pause();
    this.trigger('fill', { ...(await this.shelf.sent(take)), start: region.from, end: Math.min(region.to, this.shown.score.end) });
  }
}
