import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Instrument } from '../../app/web/player/instrument.js';
import { connectMidi, obey } from '../../app/web/player/midi_input.js';

/** A piano that only says what it does. */
function silent() {
  const sounding = new Set();
  const piano = {
    now: 0, sounding,
    strike: (pitch, velocity) => { const voice = { pitch, velocity }; sounding.add(voice); return voice; },
    release: (voice) => sounding.delete(voice),
  };
  return { instrument: new Instrument(piano), pitches: () => [...sounding].map(({ pitch }) => pitch).sort() };
}

test('keys sound while they are down, and with the pedal until it comes up', () => {
  const { instrument, pitches } = silent();
  instrument.down(60, 80, 0);
  instrument.pedal(true, 1);
  instrument.up(60, 2);
  instrument.down(64, 80, 3);
  assert.deepEqual(pitches(), [60, 64]);
  instrument.down(60, 90, 4); // its string sounds anew, not twice
  assert.deepEqual(pitches(), [60, 64]);
  instrument.up(64, 5);
  instrument.pedal(false, 6);
  assert.deepEqual(pitches(), [60]);
  instrument.release(7);
  assert.deepEqual(pitches(), []);
});

test('MIDI messages are obeyed, odd ones included', () => {
  const { instrument, pitches } = silent();
  const heard = [];
  instrument.listeners.push({
    down: (pitch, velocity, at) => heard.push(['down', pitch, velocity, at]), up: (pitch, at) => heard.push(['up', pitch, at]),
    pedal: (down, at) => heard.push(['pedal', down, at]),
  });
  const messages = [[0x93, 60, 100], [0xb0, 64, 127], [0xb0, 64, 100], [0x90, 60, 0], [0xb0, 64, 0], [0xf8], [0x90], [0x90, 5, 90], [0xe0, 0, 64], [0x80, 61, 0]];
  messages.forEach((message, at) => obey(instrument, Uint8Array.from(message), at));
  assert.deepEqual(heard, [['down', 60, 100, 0], ['pedal', true, 1], ['up', 60, 3], ['pedal', false, 4]]);
  obey(instrument, Uint8Array.from([0x90, 70, 64]), 20);
  obey(instrument, Uint8Array.from([0xb0, 123, 0]), 21);
  assert.deepEqual(pitches(), [], 'all notes off');
});

test('a keyboard that is connected twice is heard once', async () => {
  const { instrument } = silent(), struck = [], told = [], ports = [];
  instrument.listeners.push({ down: (pitch) => struck.push(pitch), up() {}, pedal() {} });
  globalThis.window = { isSecureContext: true };
  // Each access has ports of its own, and all of them hear the device.
  const requestMIDIAccess = async () => {
    const port = { type: 'input', state: 'connected', name: 'Piano', onmidimessage: null };
    ports.push(port);
    return { inputs: new Map([['1', port]]), onstatechange: null };
  };
  Object.defineProperty(globalThis, 'navigator', { value: { requestMIDIAccess }, configurable: true });
  for (let n = 0; n < 2; n++) await connectMidi(instrument, (message) => told.push(message));
  for (const port of ports) port.onmidimessage?.({ data: Uint8Array.from([0x90, 60, 80]), timeStamp: 1 });
  assert.deepEqual(struck, [60]);
  assert.equal(told.at(-1), 'Listening to Piano.');
});

test('a key that hangs is released after a minute', () => {
  const { instrument, pitches } = silent();
  instrument.down(60, 80, 0);
  instrument.down(62, 80, 50_000);
  assert.equal(instrument.releaseStuck(61_000), 1);
  assert.deepEqual(pitches(), [62]);
});
