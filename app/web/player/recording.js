// Record what is played on the instrument: count-in, again, undo.

import { pack } from './notes.js';
import { MOST_NOTES, Recorder } from './recorder.js';

/** @typedef {import('./instrument.js').Instrument} Instrument */
/** @typedef {import('./takes.js').Take} Take */

const BEATS = 4, BEAT_MS = 600;

export class Recording {
  recorder = new Recorder();
  #told = false;
  /** @type {number[]} timers of the count-in */
  #counting = [];
  /** @type {OscillatorNode[]} its clicks */
  #clicks = [];

  /**
   * @param {Instrument} instrument
   * @param {{tell: (message: string) => void, changed: () => void, done: (take: Take) => void}} on
   */
  constructor(instrument, on) {
    this.instrument = instrument;
    this.on = on;
    const { recorder } = this;
    instrument.listeners.push({
      down: (pitch, velocity, at) => {
        recorder.down(pitch, velocity, at);
        if (recorder.recording && recorder.full && !this.#told) {
          this.#told = true;
          on.tell(`A recording holds ${MOST_NOTES.toLocaleString()} notes; it is full, and all of them are kept.`);
        }
        on.changed();
      },
      up: (pitch, at) => { recorder.up(pitch, at); on.changed(); },
      pedal: (down, at) => { recorder.pedal(down, at); on.changed(); },
    });
  }

  get active() { return this.recorder.recording; }

  /** @param {boolean} countIn */
  start(countIn) {
    this.#told = false;
    this.#stopCounting();
    if (!countIn) {
      this.recorder.start();
      this.on.tell('Play. The recording begins with your first note.');
    } else this.#count(performance.now() + 100);
    this.on.changed();
  }

  /** Click four beats, then begin. @param {number} from in ms, by the clock of events */
  #count(from) {
    this.recorder.start(from + BEATS * BEAT_MS);
    const context = this.instrument.piano.ready();
    for (let beat = 0; beat < BEATS; beat++) {
      const at = context.currentTime + (from - performance.now() + beat * BEAT_MS) / 1000;
      const click = new OscillatorNode(context, { frequency: beat ? 1000 : 1500 }), gain = new GainNode(context, { gain: 0.1 });
      click.connect(gain).connect(context.destination);
      click.start(at);
      click.stop(at + 0.03);
      this.#clicks.push(click);
      this.#counting.push(window.setTimeout(() => this.on.tell(`${beat + 1} …`), from - performance.now() + beat * BEAT_MS));
    }
    this.#counting.push(window.setTimeout(() => this.on.tell('Play.'), from - performance.now() + BEATS * BEAT_MS));
  }

  #stopCounting() {
    for (const timer of this.#counting) clearTimeout(timer);
    for (const click of this.#clicks) click.stop();
    this.#counting = [];
    this.#clicks = [];
  }

  /** End the recording and hand over what was played. @param {number} at in ms */
  stop(at) {
    this.#stopCounting();
    const { keys, pedals, notes } = this.recorder.stop(at);
    if (!keys.length) {
      this.on.tell('Nothing was played.');
      return this.on.changed();
    }
    const until = Math.max(...notes.map((note) => note.off));
    this.on.done({
      id: `played-${crypto.getRandomValues(new Uint32Array(2)).join('-')}`, kind: 'played', made: Date.now(), notes: pack(notes),
      pedals, join: until, until, seed: null, latents: 0, settings: '', starred: false, turns: [], keys: pack(keys),
    });
  }
}
