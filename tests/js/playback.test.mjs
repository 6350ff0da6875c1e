import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Score } from '../../app/web/player/notes.js';
import { Playback } from '../../app/web/player/playback.js';

globalThis.document = { hidden: false };

/** Plays a score on a piano whose clock is moved by hand; what is struck, as [time, pitch]. */
function stage(notes, set = () => {}) {
  const piano = { now: 100, loaded: true, struck: [], released: [], ready() {}, strike(pitch, velocity, when) { this.struck.push([when - 100.06, pitch]); return { pitch }; }, release(voice, when) { this.released.push([when - 100.06, voice.pitch]); } };
  const playback = new Playback(piano);
  playback.update(new Score(notes), Math.max(...notes.map(({ off }) => off)), false);
  set(playback);
  const run = (seconds) => { for (let n = 0; n < seconds * 25; n++) { piano.now += 0.04; playback.tick(); } };
  return { piano, playback, run };
}
const rounded = (rows) => rows.map(([time, pitch]) => [Math.round(time * 1000) / 1000, pitch]);
const notes = [0, 1, 2, 3].map((on) => ({ on, off: on + 0.5, pitch: 60 + on, velocity: 64 }));

test('notes are struck and released on time, and it stops at the end', () => {
  const { piano, playback, run } = stage(notes);
  playback.play();
  run(2);
  assert.ok(Math.abs(playback.position - 1.94) < 0.001);
  run(3);
  assert.deepEqual(rounded(piano.struck), [[0, 60], [1, 61], [2, 62], [3, 63]]);
  assert.deepEqual(rounded(piano.released), [[0.5, 60], [1.5, 61], [2.5, 62], [3.5, 63]]);
  assert.equal(playback.playing, false);
  assert.equal(playback.position, 3.5);
});

test('tempo and transposition change what is heard', () => {
  const { piano, playback, run } = stage(notes, (each) => { each.tempo = 2; each.transpose = -3; });
  playback.play();
  run(3);
  assert.deepEqual(rounded(piano.struck), [[0, 57], [0.5, 58], [1, 59], [1.5, 60]]);
  assert.deepEqual(rounded(piano.released)[0], [0.25, 57]);
});

test('a tempo that changes moves the ends of the notes that sound', () => {
  const { piano, playback, run } = stage([{ on: 0, off: 4, pitch: 60, velocity: 64 }]);
  playback.play();
  run(1); // its first 0.94 s are over
  playback.tempo = 0.5;
  assert.deepEqual(rounded(piano.released), [[4, 60], [7.06, 60]]);
  run(1);
  assert.ok(Math.abs(playback.position - 1.44) < 0.001);
});

test('a tempo that changes near the end of a loop strikes no note twice', () => {
  const { piano, playback, run } = stage(notes, (each) => { each.loop = { from: 0, to: 1 }; });
  playback.play();
  run(0.96); // the beginning of the next round is scheduled already
  assert.deepEqual(rounded(piano.struck), [[0, 60], [1, 60]]);
  playback.tempo = 1.01;
  run(0.6);
  assert.equal(piano.struck.length, 2);
  assert.ok(playback.position > 0.4 && playback.position < 0.6);
});

test('a loop goes round without a gap, and cuts what reaches over its end', () => {
  const { piano, playback, run } = stage(notes, (each) => { each.loop = { from: 1, to: 2.25 }; });
  playback.seek(1);
  playback.play();
  run(4);
  assert.deepEqual(rounded(piano.struck).slice(0, 6), [[0, 61], [1, 62], [1.25, 61], [2.25, 62], [2.5, 61], [3.5, 62]]);
  assert.deepEqual(rounded(piano.released)[1], [1.25, 62]);
  assert.ok(playback.playing && playback.position >= 1 && playback.position < 2.25);
});

test('it waits for music that is still being made', () => {
  const { piano, playback, run } = stage(notes);
  playback.update(new Score(notes.slice(0, 1)), 1, true);
  playback.play();
  run(1);
  assert.ok(playback.waiting && !playback.sounding);
  playback.update(new Score(notes), 3.5, true);
  run(1);
  assert.ok(!playback.waiting && playback.sounding);
  assert.equal(piano.struck.length, 1 + 1);
});

test('a note whose end is not known yet ends when it is', () => {
  const { piano, playback, run } = stage(notes);
  playback.update(new Score([{ ...notes[0], held: true }]), 3, true);
  playback.play();
  run(1);
  assert.deepEqual(piano.released, []);
  playback.update(new Score([{ ...notes[0], off: 2 }]), 3, true);
  assert.deepEqual(rounded(piano.released), [[2, 60]]);
});
