// A sampled piano, played through Web Audio. Samples are three semitones apart; the notes in between are resampled.

class Piano {
  constructor(samples) {
    this.samples = samples;
    this.buffers = new Map();
    const pitches = Array.from({ length: 30 }, (_, n) => 21 + 3 * n);
    pitches.sort((a, b) => Math.abs(a - 62) - Math.abs(b - 62)); // the middle of the keyboard first
    this.loading = (async () => { for (const pitch of pitches) await this.load(pitch); })();
  }

  ready() { // browsers allow sound only after a user gesture
    if (!this.context) {
      this.context = new AudioContext();
      const limiter = new DynamicsCompressorNode(this.context, { threshold: -6, ratio: 12, attack: 0.003, release: 0.2 });
      this.output = new GainNode(this.context, { gain: 0.8 });
      this.output.connect(limiter).connect(this.context.destination);
    }
    if (this.context.state === 'suspended') this.context.resume();
    return this.context;
  }

  async load(pitch) {
    const data = await (await fetch(`${this.samples}${pitch}.ogg`)).arrayBuffer();
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

  strike(pitch, velocity, when) {
    let nearest = null;
    for (const sampled of this.buffers.keys())
      if (nearest === null || Math.abs(sampled - pitch) < Math.abs(nearest - pitch)) nearest = sampled;
    if (nearest === null) return null;
    const rate = 2 ** ((pitch - nearest) / 12);
    const source = new AudioBufferSourceNode(this.context, { buffer: this.buffers.get(nearest), playbackRate: rate });
    const hertz = 440 * 2 ** ((pitch - 69) / 12);
    const brightness = Math.min(1, velocity / 100) ** 1.5;
    const frequency = Math.min(20000, Math.max(500, 2 * hertz) + 16000 * brightness ** 2);
    const filter = new BiquadFilterNode(this.context, { type: 'lowpass', Q: -3, frequency });
    const gain = new GainNode(this.context, { gain: 0.4 * (velocity / 76) ** 1.6 });
    source.connect(filter).connect(gain).connect(this.output);
    source.start(when);
    return { source, gain, fade: pitch > 88 ? 0.4 : 0.06 };
  }

  release(voice, when, fade = voice.fade) {
    voice.gain.gain.setTargetAtTime(0, when, fade);
    voice.source.stop(when + 8 * fade);
  }
}
