import assert from 'node:assert/strict';
import { test } from 'node:test';

globalThis.matchMedia = () => ({ matches: false });
const { layout, pitchOf } = await import('../../app/web/player/keys.js');
const { midiFile } = await import('../../app/web/player/midi.js');
const { surplus } = await import('../../app/web/player/takes.js');

test('the two rows of the computer are two octaves, with the black keys between', () => {
  assert.equal(pitchOf('KeyZ', 0), 48);
  assert.equal(pitchOf('KeyS', 0), 49);
  assert.equal(pitchOf('KeyM', 0), 59);
  assert.equal(pitchOf('KeyQ', 0), 60);
  assert.equal(pitchOf('KeyI', 1), 84);
  assert.equal(pitchOf('KeyA', 0), undefined);
  assert.equal(pitchOf('KeyZ', -3), undefined, 'below the lowest key');
});

test('as many keys are shown as fit, around the octave that is played', () => {
  const all = layout(1000, 13, 0);
  assert.deepEqual([all.keys.length, all.whites], [88, 52]);
  const few = layout(320, 26, 0);
  assert.equal(few.whites, 12);
  assert.ok(few.keys.some(({ pitch }) => pitch === 60));
  for (let octave = -3; octave <= 3; octave++) {
    const { keys, whites } = layout(320, 26, octave);
    assert.equal(keys.filter(({ white }) => white).length, whites);
    assert.ok(keys[0].pitch >= 21 && keys.at(-1).pitch <= 108);
  }
});

test('a MIDI file has its notes, and a header that says how', () => {
  const file = midiFile([{ on: 0, off: 0.2, pitch: 60, velocity: 64 }], [[0.1, 0.3]]);
  assert.deepEqual([...file], [
    0x4d, 0x54, 0x68, 0x64, 0, 0, 0, 6, 0, 0, 0, 1, 1, 0xf4, 0x4d, 0x54, 0x72, 0x6b, 0, 0, 0, 31,
    0, 0xff, 0x51, 3, 0x07, 0xa1, 0x20, 0, 0x90, 60, 64, 100, 0xb0, 64, 127, 100, 0x80, 60, 64, 100, 0xb0, 64, 0, 0, 0xff, 0x2f, 0,
  ].map((byte, index) => (index === 21 ? file.length - 22 : byte)));
});

test('the oldest takes without a star are dropped first', () => {
  const takes = [3, 1, 2, 4].map((made) => ({ id: String(made), made, starred: made === 1 }));
  assert.deepEqual(surplus(takes, 2).map(({ id }) => id), ['2', '3']);
  assert.deepEqual(surplus(takes, 4), []);
});
