import assert from 'node:assert/strict';
import { test } from 'node:test';

import { MOST_NOTES, Recorder } from '../../app/web/player/recorder.js';

test('a phrase with pedal is kept to the millisecond', () => {
  const recorder = new Recorder();
  recorder.down(60, 70, 100); // before the recording: not kept
  recorder.start();
  recorder.down(60, 80, 5000);
  recorder.pedal(true, 5100);
  recorder.up(60, 5250);
  recorder.down(64, 90, 5333);
  recorder.up(64, 5400);
  recorder.pedal(false, 6001);
  recorder.down(67, 40, 7000);
  recorder.up(67, 7001);
  const { keys, pedals, notes } = recorder.stop(8000);
  assert.deepEqual(keys, [
    { on: 0, off: 0.25, pitch: 60, velocity: 80 }, { on: 0.333, off: 0.4, pitch: 64, velocity: 90 }, { on: 2, off: 2.001, pitch: 67, velocity: 40 },
  ]);
  assert.deepEqual(pedals, [[0.1, 1.001]]);
  assert.deepEqual(notes.map(({ off }) => off), [1.001, 1.001, 2.001]);
});

test('keys and pedal that are never released end with the recording', () => {
  const recorder = new Recorder();
  recorder.pedal(true, 10);
  recorder.start();
  recorder.down(60, 80, 1000);
  recorder.down(60, 81, 2000); // struck again without a release
  assert.deepEqual(recorder.notes(2500).map(({ on, off }) => [on, off]), [[0, 1], [1, 1.5]]);
  const { keys, pedals } = recorder.stop(3000);
  assert.deepEqual(keys.map(({ on, off, held }) => [on, off, held]), [[0, 1, undefined], [1, 2, undefined]]);
  assert.deepEqual(pedals, [[0, 2]]);
});

test('with a count-in the music begins when it ends', () => {
  const recorder = new Recorder();
  recorder.start(4000);
  assert.equal(recorder.length(3000), 0);
  recorder.down(60, 80, 4500);
  recorder.up(60, 5000);
  assert.deepEqual(recorder.stop(5000).keys.map(({ on, off }) => [on, off]), [[0.5, 1]]);
});

test('what is played to the count-in is not recorded, and a note that comes a little early is its first', () => {
  const recorder = new Recorder();
  recorder.start(4000);
  recorder.down(60, 80, 2000);
  recorder.up(60, 2400);
  recorder.down(62, 80, 3900);
  recorder.up(62, 4250);
  const { keys } = recorder.stop(5000);
  assert.deepEqual(keys, [{ on: 0, off: 0.25, pitch: 62, velocity: 80 }]);
});

test('10,000 notes in a minute are kept, and what is too much is left out', () => {
  const recorder = new Recorder();
  recorder.start();
  for (let n = 0; n < MOST_NOTES + 10; n++) {
    recorder.down(21 + (n % 88), 64, 6 * n);
    recorder.up(21 + (n % 88), 6 * n + 5);
  }
  assert.ok(recorder.full);
  assert.equal(recorder.stop(1e6).keys.length, MOST_NOTES);
  assert.ok(MOST_NOTES >= 10_000);
});
