// A sampled piano, played through Web Audio. Samples are three semitones apart; the notes in between are resampled.

/** @typedef {{source: AudioBufferSourceNode, gain: GainNode, fade: number}} Voice */

const MOST_VOICES = 96; // more cost the sound its steadiness on a phone
const FADED = 8; // time constants until a voice is below -69 dB, and ends
const STARTS_WITHIN_MS = 4000; // sound, after the first gesture; some devices take more than a second
const LOADED_AGAIN_MS = 3000;

export class Piano {
  /** @type {Map<number, AudioBuffer>} */
  buffers = new Map();
  /** @type {Set<Voice>} */
  #sounding = new Set();
  /** @type {AudioContext | null} */
  #context = null;
  /** @type {GainNode | null} */
  #output = null;
  #volume = 0.8;

  /** @param {string} samples address of the folder of samples @param {(message: string) => void} tell says in words why there is no sound */
  constructor(samples, tell) {
    this.samples = samples;
    this.tell = tell;
    const pitches = Array.from({ length: 30 }, (_, n) => 21 + 3 * n);
    pitches.sort((a, b) => Math.abs(a - 62) - Math.abs(b - 62)); // the middle of the keyboard first
    this.#loadAll(pitches);
  }

  /** Whether there is enough to play with. */
  get loaded() { return this.buffers.size > 3; }

  /** Make sound possible: browsers allow it only after a user gesture. */
  ready() {
    if (!this.#context || !this.#output) {
      this.#context = new AudioContext({ latencyHint: 'interactive' });
      const limiter = new DynamicsCompressorNode(this.#context, { threshold: -6, ratio: 12, attack: 0.003, release: 0.2 });
      this.#output = new GainNode(this.#context, { gain: this.#volume });
      this.#output.connect(limiter).connect(this.#context.destination);
    }
    if (this.#context.state !== 'running') this.#start(this.#context); // suspended; or interrupted, by a call on a phone
    return this.#context;
  }

  #starting = 0;

  /** @param {AudioContext} context */
  #start(context) {
    context.resume().catch(() => {}); // told below, since some browsers never answer
    clearTimeout(this.#starting);
    this.#starting = window.setTimeout(() => {
      if (context.state !== 'running') this.tell('There is no sound: the browser found no loudspeaker or headphones, or is not allowed to use them.');
    }, STARTS_WITHIN_MS);
  }

  /** Seconds by the clock of the sound. */
  get now() { return this.#context?.currentTime ?? 0; }

  /** Loudness, from 0 to 1. @param {number} volume */
  set volume(volume) {
    this.#volume = volume;
    if (this.#context && this.#output) this.#output.gain.setTargetAtTime(volume, this.#context.currentTime, 0.02);
  }

  /** Load samples, one after the other. What the network loses is asked for again. @param {number[]} pitches */
  async #loadAll(pitches) {
    /** @type {number[]} */
    const lost = [];
    for (const pitch of pitches) {
      try { await this.#load(pitch); } catch (error) {
        if (!(error instanceof TypeError)) return this.tell('This browser cannot read the sound of the piano (Ogg Vorbis). Update it, or use another.');
        lost.push(pitch);
      }
    }
    if (lost.length) window.setTimeout(() => this.#loadAll(lost), LOADED_AGAIN_MS);
  }

  /** @param {number} pitch @throws {TypeError} the network lost it */
  async #load(pitch) {
    const response = await fetch(`${this.samples}${pitch}.ogg`);
    if (!response.ok) throw new TypeError(`HTTP ${response.status}`);
    const data = await response.arrayBuffer();
    const whole = await new OfflineAudioContext(2, 1, 48000).decodeAudioData(data); // works before a user gesture
    const left = whole.getChannelData(0);
    let peak = 0;
    for (let n = 0; n < whole.sampleRate; n++) peak = Math.max(peak, Math.abs(left[n]));
    let first = 0; // as in music_ar/audio/synthesis.py: from 2 ms before the onset, at most 8 s
    while (first < whole.sampleRate / 4 && Math.abs(left[first]) < 0.02 * peak) first++;
    first = Math.max(0, first - whole.sampleRate / 500);
    const length = Math.min(whole.length - first, 8 * whole.sampleRate);
    const buffer = new AudioBuffer({ length, numberOfChannels: whole.numberOfChannels, sampleRate: whole.sampleRate });
    for (let side = 0; side < whole.numberOfChannels; side++)
      buffer.copyToChannel(whole.getChannelData(side).subarray(first, first + length), side);
    this.buffers.set(pitch, buffer);
  }

  /**
   * Strike a key.
   * @param {number} pitch
   * @param {number} velocity from 1 to 127
   * @param {number} when by the clock of the sound; 0 is at once
   * @returns {Voice | null} null while no sample is there yet
   */
  strike(pitch, velocity, when) {
    const context = this.ready();
    let nearest = null;
    for (const sampled of this.buffers.keys())
      if (nearest === null || Math.abs(sampled - pitch) < Math.abs(nearest - pitch)) nearest = sampled;
    if (nearest === null || !this.#output) return null;
    const rate = 2 ** ((pitch - nearest) / 12);
    const source = new AudioBufferSourceNode(context, { buffer: this.buffers.get(nearest), playbackRate: rate });
    const hertz = 440 * 2 ** ((pitch - 69) / 12);
    const brightness = Math.min(1, velocity / 100) ** 1.5;
    const frequency = Math.min(20000, Math.max(500, 2 * hertz) + 16000 * brightness ** 2);
    const filter = new BiquadFilterNode(context, { type: 'lowpass', Q: -3, frequency });
    const gain = new GainNode(context, { gain: 0.4 * (velocity / 76) ** 1.6 });
    source.connect(filter).connect(gain).connect(this.#output);
    source.start(when);
    const voice = { source, gain, fade: pitch > 88 ? 0.4 : 0.06 };
    this.#sounding.add(voice);
    source.addEventListener('ended', () => { this.#sounding.delete(voice); gain.disconnect(); });
    if (this.#sounding.size > MOST_VOICES) this.#steal(context.currentTime);
    return voice;
  }

  /** @param {number} now */
  #steal(now) {
    const [oldest] = this.#sounding;
    this.#sounding.delete(oldest);
    this.release(oldest, now, 0.02);
  }

  /**
   * Let a voice fade, and end; in place of an end that has not come yet.
   * @param {Voice} voice
   * @param {number} when by the clock of the sound
   * @param {number} [fade] time constant in seconds
   */
  release(voice, when, fade = voice.fade) {
    voice.gain.gain.cancelScheduledValues(this.now);
    voice.gain.gain.setTargetAtTime(0, when, fade);
    voice.source.stop(when + FADED * fade);
  }
}
